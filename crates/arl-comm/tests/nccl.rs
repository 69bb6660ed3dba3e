//! NCCL over a library of tests, whose ranks are threads or processes, and as far as it goes without a GPU over the real one;
//! and ranks that TCP connects.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::panic, reason = "tests")]
#![cfg(target_os = "linux")]

mod fake;
#[path = "nccl/groups.rs"]
mod groups;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arl_comm::{Collective, Communicator, Gpus, Group, Listener, Nccl, Place, Star, Watch, local_groups, with_gpus};
use arl_model::{Error, ErrorCode, Result};

/// The library of tests, made once.
fn fake() -> Arc<Nccl> {
    static MADE: OnceLock<(tempfile::TempDir, Arc<Nccl>)> = OnceLock::new();
    let (_, nccl) = MADE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let nccl = Nccl::open(&fake::library(folder.path(), 23_007)).unwrap();
        (folder, nccl)
    });
    Arc::clone(nccl)
}

fn gpus(nccl: &Arc<Nccl>, id: [u8; 128]) -> Gpus {
    Gpus { nccl: Arc::clone(nccl), id, watch: Arc::new(Watch::new()) }
}

/// What each of `size` threads gives, each a rank.
fn ranks<T: Send>(size: usize, work: impl Fn(&mut Communicator, usize) -> T + Sync) -> Vec<T> {
    let (nccl, work) = (fake(), &work);
    let id = nccl.unique_id().unwrap();
    std::thread::scope(|scope| {
        let nccl = &nccl;
        let spawn = |rank| scope.spawn(move || work(&mut Communicator::new(gpus(nccl, id), rank, size).unwrap(), rank));
        let all: Vec<_> = (0..size).map(spawn).collect();
        all.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn place(bytes: &mut [u8]) -> Place {
    Place { address: bytes.as_mut_ptr().expose_provenance() as u64, bytes: bytes.len() }
}

fn queue(communicator: &mut Communicator, collective: &Collective) -> Result<()> {
    // SAFETY: the places are vectors of the caller's that outlive the call, and the library of tests moves bytes within it.
    unsafe { communicator.queue(collective, std::ptr::null_mut()) }
}

/// Numbers that all ranks can compute: what `from` sends to `to`.
fn noise(from: usize, to: usize, length: usize) -> Vec<u8> {
    let mut state = (from * 31 + to * 7 + length) as u64 | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Sizes at the edges of what the library moves at a time, and of nothing.
const SIZES: [usize; 6] = [0, 1, 3, 4097, 1 << 20, (2 << 20) + 5];

fn leaves(communicator: &mut Communicator, rank: usize) {
    let size = communicator.size();
    for length in SIZES {
        let mut source = noise(rank, 0, length);
        let mut target = vec![0; size * length];
        for in_place in [false, true] {
            target.fill(0);
            let own = rank * length..(rank + 1) * length;
            let source = if in_place {
                target[own.clone()].copy_from_slice(&source);
                place(&mut target[own])
            } else {
                place(&mut source)
            };
            queue(communicator, &Collective::AllGather { source, target: place(&mut target) }).unwrap();
            let expected: Vec<u8> = (0..size).flat_map(|from| noise(from, 0, length)).collect();
            assert!(target == expected, "all_gather of {length} bytes");
        }
        for root in 0..size {
            let mut bytes = if rank == root { noise(root, 1, length) } else { vec![0; length] };
            queue(communicator, &Collective::Broadcast { root, place: place(&mut bytes) }).unwrap();
            assert!(bytes == noise(root, 1, length), "broadcast of {length} bytes from {root}");
        }
        // Every pair has a length of its own, some nothing at all; and every rank sends twice, in order.
        let of_pair = |from: usize, to: usize| length * ((from + 2 * to) % 3) / 2;
        let others: Vec<usize> = (0..size).filter(|&other| other != rank).collect();
        let mut outgoing: Vec<[Vec<u8>; 2]> = others
            .iter()
            .map(|&to| [noise(rank, to, of_pair(rank, to)), noise(rank, to + size, of_pair(rank, to) / 3)])
            .collect();
        let mut incoming: Vec<[Vec<u8>; 2]> =
            others.iter().map(|&from| [vec![0; of_pair(from, rank)], vec![0; of_pair(from, rank) / 3]]).collect();
        let list = |all: &mut [[Vec<u8>; 2]]| -> Vec<(usize, Place)> {
            let pairs = others.iter().zip(all);
            pairs.flat_map(|(&other, two)| two.each_mut().map(|bytes| (other, place(bytes)))).collect()
        };
        let (sends, receives) = (list(&mut outgoing), list(&mut incoming));
        queue(communicator, &Collective::Exchange { sends, receives }).unwrap();
        for (&from, [first, second]) in others.iter().zip(&incoming) {
            assert!(*first == noise(from, rank, of_pair(from, rank)), "{length} bytes from {from}");
            assert!(*second == noise(from, rank + size, of_pair(from, rank) / 3), "{length} bytes from {from}");
        }
    }
    communicator.poll().unwrap();
    assert_eq!(communicator.watch().waiting(), None);
}

#[test]
fn collectives_move_the_right_bytes_between_threads() {
    for size in [1, 2, 3, 4] {
        ranks(size, leaves);
    }
}

const CASE: &str = "ARL_NCCL_CASE";

/// What a rank that is a process does; without [`CASE`] there is nothing to do.
#[test]
fn one_rank() {
    let Ok(case) = std::env::var(CASE) else { return };
    let [file, id, rank, size] = case.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let nccl = Nccl::open(Path::new(file)).unwrap();
    let id: Vec<u8> = (0..128).map(|i| u8::from_str_radix(&id[2 * i..2 * i + 2], 16).unwrap()).collect();
    let (rank, size) = (rank.parse().unwrap(), size.parse().unwrap());
    leaves(&mut Communicator::new(gpus(&nccl, id.try_into().unwrap()), rank, size).unwrap(), rank);
}

#[test]
fn collectives_move_the_right_bytes_between_processes() {
    let folder = tempfile::tempdir().unwrap();
    let file = fake::library(folder.path(), 23_007);
    let id = Nccl::open(&file).unwrap().unique_id().unwrap();
    let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let start = |rank: usize| {
        let case = format!("{} {id} {rank} 2", file.display());
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "one_rank"]).env(CASE, case).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    for child in [start(0), start(1)] {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

/// The errors of two ranks that call different things.
fn differing(calls: [fn(&mut [u8]) -> Collective; 2]) -> [Error; 2] {
    let started = Instant::now();
    let found = ranks(2, |communicator, rank| {
        let mut bytes = vec![0; 128];
        queue(communicator, &calls[rank](&mut bytes)).unwrap_err()
    });
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    found.try_into().unwrap()
}

#[test]
fn calls_that_do_not_fit_together_are_an_error_with_both() {
    fn gather(bytes: &mut [u8]) -> Collective {
        Collective::AllGather { source: place(&mut bytes[96..]), target: place(&mut bytes[..64]) }
    }
    fn from_one(bytes: &mut [u8]) -> Collective {
        Collective::Broadcast { root: 1, place: place(&mut bytes[..32]) }
    }
    fn short_send(bytes: &mut [u8]) -> Collective {
        Collective::Exchange { sends: vec![(1, place(&mut bytes[..8]))], receives: vec![] }
    }
    fn long_receive(bytes: &mut [u8]) -> Collective {
        Collective::Exchange { sends: vec![], receives: vec![(0, place(&mut bytes[..9]))] }
    }
    for (calls, texts) in [
        ([gather, from_one], ["all_gather(0, 32)", "broadcast(1, 32)"]),
        ([short_send, long_receive], ["send(1, 8)", "receive(0, 9)"]),
        ([short_send, gather], ["send(1, 8)", "all_gather(0, 32)"]),
    ] {
        for error in differing(calls) {
            assert_eq!(error.code, ErrorCode::Device);
            assert!(texts.iter().all(|text| error.message.contains(text)), "{}", error.message);
            assert!(error.message.contains("NCCL 2.30.7"), "{}", error.message);
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused_before_anything_is_queued() {
    let errors = ranks(2, |communicator, _| {
        let mut bytes = vec![0; 64];
        let collective = Collective::AllGather { source: place(&mut bytes[..31]), target: place(&mut bytes) };
        queue(communicator, &collective).unwrap_err()
    });
    assert!(errors.iter().all(|error| error.code == ErrorCode::Internal));
}

#[test]
fn a_rank_that_waits_ends_when_it_learns_of_a_failure_and_queues_nothing_more() {
    let (done, waits) = std::sync::mpsc::channel::<()>();
    let waits = std::sync::Mutex::new(waits);
    ranks(2, |communicator, rank| {
        if rank > 0 {
            // Comes to no collective before the other one has ended.
            return waits.lock().unwrap().recv().unwrap();
        }
        let watch = Arc::clone(communicator.watch());
        let teller = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            watch.fail("rank 1 is tired".into());
        });
        let (started, mut bytes) = (Instant::now(), vec![0; 8]);
        let broadcast = Collective::Broadcast { root: 1, place: place(&mut bytes) };
        let error = queue(communicator, &broadcast).unwrap_err();
        assert!(error.message.contains("rank 1 is tired"), "{}", error.message);
        assert_eq!(error.code, ErrorCode::Interrupted);
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        assert_eq!(queue(communicator, &broadcast).unwrap_err().code, ErrorCode::Interrupted);
        assert_eq!(communicator.poll().unwrap_err().code, ErrorCode::Interrupted);
        teller.join().unwrap();
        done.send(()).unwrap();
    });
}

#[test]
fn a_library_that_is_too_old_is_told_with_both_versions_and_one_that_is_none_with_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let old = Nccl::open(&fake::library(folder.path(), 22_602)).err().unwrap();
    assert_eq!(old, "it is NCCL 2.26.2, and 2.27.0 or newer is needed");
    assert_eq!(Nccl::open(Path::new("libc.so.6")).err().unwrap(), "it has no ncclGetVersion");
    assert!(Nccl::open(Path::new("/nowhere/libnccl.so.2")).err().unwrap().contains("/nowhere/libnccl.so.2"));
    assert_eq!(fake().text().split(" (").next(), Some("NCCL 2.30.7"));
}

/// NVIDIA's own library, where one is named, or a Python environment has its wheel.
fn real() -> Option<PathBuf> {
    if let Some(file) = std::env::var_os("ARL_NCCL") {
        return Some(file.into());
    }
    let lib = Path::new(&std::env::var_os("ARL_PYTHON")?).parent()?.parent()?.join("lib");
    let pythons = std::fs::read_dir(lib).ok()?.flatten();
    pythons.map(|python| python.path().join("site-packages/nvidia/nccl/lib/libnccl.so.2")).find(|file| file.exists())
}

/// Every function resolves and answers; without a driver, a communicator is refused in NCCL's words. Its ids have a thread that
/// waits for ranks, so that this is a process of its own.
#[test]
fn nvidias_own_library_is_opened_and_refuses_in_its_own_words() {
    let Some(file) = real() else {
        println!("SKIPPED: NVIDIA's own NCCL: ARL_NCCL and ARL_PYTHON name none");
        return;
    };
    if Path::new("/dev/nvidiactl").exists() {
        println!("SKIPPED: NVIDIA's own NCCL without a GPU: there is one");
        return;
    }
    let nccl = Nccl::open(&file).unwrap();
    assert!(nccl.text().starts_with("NCCL 2."), "{}", nccl.text());
    let id = nccl.unique_id().unwrap();
    assert!(id.iter().any(|&byte| byte != 0));
    let error = Communicator::new(gpus(&nccl, id), 0, 2).err().unwrap();
    assert_eq!(error.code, ErrorCode::Device);
    assert!(error.message.contains("CUDA") && error.message.contains(&nccl.text()), "{}", error.message);
    println!("{}", error.message);
}

/// Ranks over TCP, and what they gave.
fn star<T: Send>(size: usize, work: impl Fn(Arc<Star>) -> T + Sync) -> Vec<T> {
    let listener = Listener::open(size, "a token".into()).unwrap();
    let port = listener.port().unwrap();
    let work = &work;
    std::thread::scope(|scope| {
        // A stranger, who is not let in.
        let _ = std::net::TcpStream::connect(("127.0.0.1", port)).map(|mut stream| {
            std::io::Write::write_all(&mut stream, b"no token but as long").unwrap();
        });
        let others: Vec<_> = (1..size)
            .map(|rank| {
                let hosts = ["127.0.0.1".to_string()];
                scope.spawn(move || work(Arc::new(Star::connect(&hosts, port, "a token", rank, size).unwrap())))
            })
            .collect();
        let first = work(Arc::new(listener.accept(Duration::from_secs(20)).unwrap()));
        std::iter::once(first).chain(others.into_iter().map(|rank| rank.join().unwrap())).collect()
    })
}

#[test]
fn ranks_over_tcp_move_the_right_bytes() {
    for size in [1, 2, 4] {
        star(size, |star| {
            let (rank, size) = (star.rank(), star.size());
            for length in [0, 1, 4097, (1 << 20) + 3] {
                let mut gathered = vec![0; size * length];
                star.all_gather(&noise(rank, 0, length), &mut gathered).unwrap();
                assert!(gathered == (0..size).flat_map(|from| noise(from, 0, length)).collect::<Vec<_>>());
                for root in 0..size {
                    let mut bytes = if rank == root { noise(root, 1, length) } else { vec![0; length] };
                    star.broadcast(root, &mut bytes).unwrap();
                    assert!(bytes == noise(root, 1, length));
                }
                let of_pair = |from: usize, to: usize| length * ((from + 2 * to) % 3) / 2;
                let sends: Vec<Vec<u8>> = (0..size).map(|to| noise(rank, to, of_pair(rank, to))).collect();
                let mut receives: Vec<Vec<u8>> = (0..size).map(|from| vec![0; of_pair(from, rank)]).collect();
                star.exchange(&sends.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut receives).unwrap();
                for (from, bytes) in receives.iter().enumerate() {
                    assert!(*bytes == noise(from, rank, of_pair(from, rank)), "{length} bytes from {from}");
                }
            }
        });
    }
}

#[test]
fn a_rank_over_tcp_ends_when_another_one_is_gone_or_has_failed() {
    let errors = star(3, |star| {
        if star.rank() == 2 {
            return None;
        }
        if star.rank() == 1 {
            star.watch().fail("rank 2 is tired".into());
        }
        Some(star.all_gather(&[1], &mut [0; 3]).unwrap_err())
    });
    let texts: Vec<String> = errors.into_iter().flatten().map(|error| error.message).collect();
    assert_eq!(texts[0], "ended because rank 2 has closed its connection");
    assert!(texts[1].contains("rank 2 is tired") || texts[1].contains("rank 0 has closed"), "{}", texts[1]);
}

#[test]
fn a_rank_that_does_not_connect_is_named() {
    let listener = Listener::open(2, "t".into()).unwrap();
    let error = listener.accept(Duration::from_millis(50)).err().unwrap();
    assert_eq!((error.code, error.message.contains("rank 1 has not connected")), (ErrorCode::Device, true));
    let error = Star::connect(&["127.0.0.1".into()], 1, "t", 1, 2).err().unwrap();
    assert!(error.message.contains("rank 1 cannot reach rank 0 on port 1: 127.0.0.1: "), "{}", error.message);
}

#[test]
fn a_group_with_gpus_moves_host_memory_as_the_one_that_it_is_made_of() {
    let nccl = fake();
    let gpus = gpus(&nccl, [7; 128]);
    let group = with_gpus(local_groups(1).remove(0), gpus);
    let mut target = [0; 2];
    group.all_gather(&[3, 4], &mut target).unwrap();
    assert_eq!((target, group.gpus().map(|gpus| gpus.id[0]), group.size()), ([3, 4], Some(7), 1));
    assert!(local_groups(1).remove(0).gpus().is_none());
}
