//! Ranks that are each connected to rank 0 by TCP: for figures, which are few, where the launcher has no MPI. What is large
//! goes from device to device. Calls are polled: a rank that learns of another one's failure ends within the next poll.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arl_model::{Error, ErrorCode, Result};

use crate::Group;
use crate::watch::Watch;

/// How long a read or a write lasts before a failure is looked for.
const POLL: Duration = Duration::from_millis(50);

/// How long a connection has to say which rank it is from, and how long one takes at most to be made.
const HELLO: Duration = Duration::from_secs(10);

/// Bytes of what a connection begins with, besides the token: the rank.
const RANK_BYTES: usize = 4;

/// Where rank 0 waits for the others.
pub struct Listener {
    listener: TcpListener,
    size: usize,
    token: String,
    watch: Arc<Watch>,
}

impl Listener {
    /// Listens on a port of the system's choice, on all addresses. `token`: what the others know of it.
    pub fn open(size: usize, token: String) -> Result<Self> {
        let any = [SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)), SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))];
        let listener =
            TcpListener::bind(any.as_slice()).map_err(|error| failed("listening for other ranks", &error))?;
        listener.set_nonblocking(true).map_err(|error| failed("listening for other ranks", &error))?;
        Ok(Listener { listener, size, token, watch: Arc::new(Watch::new()) })
    }

    /// The port.
    pub fn port(&self) -> Result<u16> {
        self.listener.local_addr().map(|address| address.port()).map_err(|error| failed("listening", &error))
    }

    /// How the process sees, and ends, what waits for other ranks.
    pub fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }

    /// Waits until all ranks are connected, for `limit` at most. Connections that do not know the token are closed.
    pub fn accept(self, limit: Duration) -> Result<Star> {
        let begun = Instant::now();
        let mut links: Vec<Option<TcpStream>> = (0..self.size).map(|_| None).collect();
        let watch = Arc::clone(&self.watch);
        watch.during(|| {
            while let Some(missing) = (1..self.size).find(|&rank| links[rank].is_none()) {
                watch.check()?;
                if begun.elapsed() > limit {
                    let message = format!("rank {missing} has not connected to rank 0 in {} s", limit.as_secs());
                    return Err(Error::new(ErrorCode::Device, message)
                        .hint("every host must be able to connect to rank 0's host by TCP, on any port"));
                }
                match self.listener.accept() {
                    Ok((stream, _)) => {
                        if let Some(rank) = self.welcome(&stream).filter(|&rank| links[rank].is_none()) {
                            links[rank] = Some(stream);
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(POLL / 10),
                    Err(error) => return Err(failed("waiting for other ranks", &error)),
                }
            }
            Ok(())
        })?;
        Ok(Star { rank: 0, size: self.size, links: Mutex::new(links), watch: self.watch })
    }

    /// The rank that a connection is from; `None`: a stranger's.
    fn welcome(&self, mut stream: &TcpStream) -> Option<usize> {
        stream.set_nonblocking(false).ok()?;
        stream.set_read_timeout(Some(HELLO)).ok()?;
        let mut hello = vec![0; self.token.len() + RANK_BYTES];
        stream.read_exact(&mut hello).ok()?;
        let (token, rank) = hello.split_at(self.token.len());
        // All of it is compared, whatever differs.
        let differs = token.iter().zip(self.token.as_bytes()).fold(0, |sum, (a, b)| sum | (a ^ b));
        let rank = u32::from_le_bytes(rank.try_into().ok()?) as usize;
        ((1..self.size).contains(&rank) && differs == 0 && prepare(stream).is_ok()).then_some(rank)
    }
}

/// All ranks, each connected to rank 0.
pub struct Star {
    rank: usize,
    size: usize,
    /// Rank 0's, by rank; another rank's alone, at 0.
    links: Mutex<Vec<Option<TcpStream>>>,
    watch: Arc<Watch>,
}

impl Star {
    /// Connects to rank 0, which listens on a port of one of `hosts`.
    pub fn connect(hosts: &[String], port: u16, token: &str, rank: usize, size: usize) -> Result<Self> {
        let mut reasons = Vec::new();
        let addresses = |host: &String| (host.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
        for host in hosts {
            let connected = addresses(host).and_then(|found| {
                let mut result = Err(std::io::Error::from(ErrorKind::NotFound));
                for address in found {
                    result = TcpStream::connect_timeout(&address, HELLO);
                    if result.is_ok() {
                        break;
                    }
                }
                let mut stream = result?;
                prepare(&stream)?;
                stream.write_all(token.as_bytes())?;
                stream.write_all(&u32::try_from(rank).unwrap_or(u32::MAX).to_le_bytes())?;
                Ok(stream)
            });
            match connected {
                Ok(stream) => {
                    let links = Mutex::new(vec![Some(stream)]);
                    return Ok(Star { rank, size, links, watch: Arc::new(Watch::new()) });
                }
                Err(error) => reasons.push(format!("{host}: {error}")),
            }
        }
        let message = format!("rank {rank} cannot reach rank 0 on port {port}: {}", reasons.join("; "));
        Err(Error::new(ErrorCode::Device, message)
            .hint("every host must be able to connect to rank 0's host by TCP, on any port"))
    }

    /// How the process sees, and ends, what waits for other ranks.
    pub fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }

    fn call<T>(&self, call: impl FnOnce(&mut Links<'_>) -> Result<T>) -> Result<T> {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        self.watch.during(|| call(&mut Links { links, watch: &self.watch }))
    }
}

/// Connections that a call uses.
struct Links<'a> {
    links: MutexGuard<'a, Vec<Option<TcpStream>>>,
    watch: &'a Watch,
}

impl Links<'_> {
    /// Sends a message to a rank: its length, then its bytes.
    fn send(&mut self, rank: usize, bytes: &[u8]) -> Result<()> {
        self.write(rank, &(bytes.len() as u64).to_le_bytes())?;
        self.write(rank, bytes)
    }

    /// Receives a message of a rank, which has a known length.
    fn receive(&mut self, rank: usize, bytes: &mut [u8]) -> Result<()> {
        let mut length = [0; 8];
        self.read(rank, &mut length)?;
        if u64::from_le_bytes(length) != bytes.len() as u64 {
            let found = u64::from_le_bytes(length);
            let message = format!("rank {rank} sends {found} bytes where {} are expected", bytes.len());
            return Err(Error::new(ErrorCode::Internal, message));
        }
        self.read(rank, bytes)
    }

    fn write(&mut self, rank: usize, bytes: &[u8]) -> Result<()> {
        self.whole(rank, bytes.len(), |mut stream, done| stream.write(&bytes[done..]))
    }

    fn read(&mut self, rank: usize, bytes: &mut [u8]) -> Result<()> {
        let length = bytes.len();
        self.whole(rank, length, |mut stream, done| stream.read(&mut bytes[done..]))
    }

    /// Repeats what moves some of `length` bytes, from the given one on, until all are moved.
    fn whole(
        &mut self,
        rank: usize,
        length: usize,
        mut part: impl FnMut(&TcpStream, usize) -> std::io::Result<usize>,
    ) -> Result<()> {
        let gone =
            || Error::new(ErrorCode::Interrupted, format!("ended because rank {rank} has closed its connection"));
        let stream = self.links.get(rank).and_then(Option::as_ref).ok_or_else(gone)?;
        let mut done = 0;
        while done < length {
            match part(stream, done) {
                Ok(0) => return Err(gone()),
                Ok(moved) => done += moved,
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => self.watch.check()?,
                    _ => return Err(gone()),
                },
            }
        }
        Ok(())
    }
}

/// Reads and writes return after a while, so that failures are seen.
fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(POLL))?;
    stream.set_write_timeout(Some(POLL))
}

fn failed(what: &str, error: &std::io::Error) -> Error {
    Error::new(ErrorCode::Device, format!("{what}: {error}")).hint("look at the host's network")
}

impl Group for Arc<Star> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&self, sends: &[&[u8]], receives: &mut [Vec<u8>]) -> Result<()> {
        receives[self.rank].copy_from_slice(sends[self.rank]);
        let others = |rank: usize| (0..self.size).filter(move |&other| other != rank);
        self.call(|links| {
            if self.rank > 0 {
                others(self.rank).try_for_each(|to| links.send(0, sends[to]))?;
                return others(self.rank).try_for_each(|from| links.receive(0, &mut receives[from]));
            }
            // What each rank sends to each, by sender: of the others rank 0 learns the lengths as they come.
            let mut sent: Vec<Vec<Vec<u8>>> = vec![Vec::new()];
            for from in 1..self.size {
                let mut of_rank = Vec::with_capacity(self.size - 1);
                for _ in others(from) {
                    let mut length = [0; 8];
                    links.read(from, &mut length)?;
                    let mut bytes = vec![0; usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX)];
                    links.read(from, &mut bytes)?;
                    of_rank.push(bytes);
                }
                sent.push(of_rank);
            }
            // The place of a rank among those that another one sends to, which are all but itself.
            let place = |from: usize, to: usize| if to > from { to - 1 } else { to };
            for from in 1..self.size {
                let bytes = &sent[from][0];
                if bytes.len() != receives[from].len() {
                    let found = format!("rank {from} sends {} bytes, not {}", bytes.len(), receives[from].len());
                    return Err(Error::new(ErrorCode::Internal, found));
                }
                receives[from].copy_from_slice(bytes);
            }
            for to in 1..self.size {
                links.send(to, sends[to])?;
                others(to)
                    .filter(|&from| from > 0)
                    .try_for_each(|from| links.send(to, &sent[from][place(from, to)]))?;
            }
            Ok(())
        })
    }

    fn all_gather(&self, source: &[u8], target: &mut [u8]) -> Result<()> {
        assert_eq!(target.len(), self.size * source.len(), "the target of all_gather has another length");
        self.call(|links| {
            if self.rank > 0 {
                links.send(0, source)?;
                return links.receive(0, target);
            }
            if source.is_empty() {
                return (1..self.size)
                    .try_for_each(|from| links.receive(from, &mut []).and_then(|()| links.send(from, &[])));
            }
            for (from, place) in target.chunks_exact_mut(source.len()).enumerate() {
                if from == 0 { place.copy_from_slice(source) } else { links.receive(from, place)? }
            }
            (1..self.size).try_for_each(|to| links.send(to, target))
        })
    }

    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        self.call(|links| {
            if self.rank > 0 {
                return if self.rank == root { links.send(0, buffer) } else { links.receive(0, buffer) };
            }
            if root > 0 {
                links.receive(root, buffer)?;
            }
            (1..self.size).filter(|&to| to != root).try_for_each(|to| links.send(to, buffer))
        })
    }
}
