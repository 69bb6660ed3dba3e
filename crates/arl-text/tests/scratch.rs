//! Folders for temporary files: gone at the end, and never left behind for good.
use std::fs::{create_dir, exists, read_dir, write};

use arl_text::ScratchFolder;

#[test]
fn a_folder_is_of_one_owner_and_gone_when_it_is_closed_or_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let parent = dir.path().join("not/there/yet");
    let mut first = ScratchFolder::create(&parent).unwrap();
    let second = ScratchFolder::create(&parent).unwrap();
    assert_ne!(first.path(), second.path());
    for folder in [&first, &second] {
        write(folder.path().join("rows"), "text").unwrap();
    }
    first.close();
    first.close();
    assert!(!exists(first.path()).unwrap() && exists(second.path().join("rows")).unwrap());
    drop(second);
    assert_eq!(read_dir(&parent).unwrap().count(), 0);
}

#[test]
fn what_a_killed_process_left_is_removed_and_what_is_in_use_stays() {
    let dir = tempfile::tempdir().unwrap();
    let used = ScratchFolder::create(dir.path()).unwrap();
    write(used.path().join("rows"), "text").unwrap();
    // Killed before it made its lock, and while it wrote: a lock that nobody holds.
    create_dir(dir.path().join(".arl-scratch-1-0")).unwrap();
    create_dir(dir.path().join(".arl-scratch-1-1")).unwrap();
    write(dir.path().join(".arl-scratch-1-1/lock"), "").unwrap();
    write(dir.path().join(".arl-scratch-1-1/rows"), "text").unwrap();
    create_dir(dir.path().join("another")).unwrap();
    let new = ScratchFolder::create(dir.path()).unwrap();
    let mut names: Vec<_> = read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let mut expected = vec![used.path().to_owned(), new.path().to_owned(), dir.path().join("another")];
    expected.sort();
    assert_eq!(names, expected);
    assert_eq!(std::fs::read(used.path().join("rows")).unwrap(), b"text");
}

#[test]
fn many_at_once_never_take_each_others_folders() {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let parent = dir.path();
            scope.spawn(move || {
                for _ in 0..50 {
                    let folder = ScratchFolder::create(parent).unwrap();
                    let file = folder.path().join("rows");
                    write(&file, format!("{thread}")).unwrap();
                    std::thread::yield_now();
                    assert_eq!(std::fs::read_to_string(&file).unwrap(), format!("{thread}"));
                }
            });
        }
    });
    assert_eq!(read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_place_that_cannot_hold_it_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    write(&file, "").unwrap();
    let error = ScratchFolder::create(&file).unwrap_err();
    assert_eq!(error.code, arl_model::ErrorCode::Io);
    assert!(error.message.contains("file"), "{error}");
}
