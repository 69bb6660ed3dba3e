//! The choice of algorithms with a library of fixed times.

use std::sync::{Arc, Mutex};

use arl_model::{Error, ErrorCode};

use super::*;
use crate::backend::MatmulAlgorithms;
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::CudaBackend;
use crate::backend::cuda::emulated::EmulatedDevice;
use crate::backend::cuda::step_tests::common::{deeper, options};
use crate::engine::Engine;
use crate::options::{EngineOptions, Recompute, Weights};

/// A library whose algorithm `i` takes `seconds[i]`, or fails.
struct Fake {
    seconds: Vec<Option<f64>>,
    /// Numbers of algorithms that it refuses.
    refused: Vec<u64>,
    /// Times that an algorithm ran.
    runs: Vec<u64>,
    /// Most proposals that were asked for, call by call.
    asked: Vec<usize>,
}

fn algorithm(number: u64) -> Algorithm {
    Algorithm([number, 0x0123_4567_89ab_cdef, u64::MAX, 0, 1, 2, 3, number << 32])
}

impl Fake {
    fn new(seconds: &[f64]) -> Self {
        let seconds = seconds.iter().map(|seconds| Some(*seconds)).collect();
        Fake { seconds, refused: Vec::new(), runs: Vec::new(), asked: Vec::new() }
    }
}

impl Proposals for Fake {
    fn proposed(&mut self, most: usize) -> Result<Vec<Algorithm>> {
        self.asked.push(most);
        Ok((0..self.seconds.len() as u64).map(algorithm).take(most).collect())
    }

    fn takes(&mut self, algorithm: &Algorithm) -> bool {
        !self.refused.contains(&algorithm.0[0])
    }

    fn time(&mut self, algorithm: &Algorithm) -> Result<f64> {
        let number = algorithm.0[0];
        self.runs.push(number);
        let earlier = self.runs.iter().filter(|run| **run == number).count() - 1;
        // The first run of each says nothing, and later ones differ a little.
        let noise = if earlier == 0 { 0.1 } else { 1.0 + 0.01 * earlier as f64 };
        let seconds = self.seconds[number as usize];
        seconds.map(|seconds| noise * seconds).ok_or_else(|| Error::new(ErrorCode::Device, format!("{number} fails")))
    }
}

fn product(m: usize) -> Product {
    Product {
        layout: Layout::Nt,
        m,
        n: 1024,
        k: 3072,
        strides: [3072, 3072, 1024],
        types: [DType::Bf16; 3],
        accumulate: false,
        bias: None,
        alignments: [256; 3],
    }
}

fn empty() -> Algorithms {
    Algorithms::open("GPU", 130_000, None).0
}

/// The number of the algorithm that is chosen.
fn chosen(algorithms: &mut Algorithms, product: &Product, library: &mut Fake) -> u64 {
    algorithms.choose(product, library).unwrap().0[0]
}

#[test]
fn the_fastest_is_taken_the_first_of_equals_and_measured_once() {
    for (seconds, expected) in
        [(&[3.0, 2.0, 1.0, 2.0][..], 2), (&[1.0, 1.0, 1.0], 0), (&[2.0, 1.0, 1.0], 1), (&[1.0], 0), (&[1.0, 0.5], 1)]
    {
        let (mut algorithms, mut library) = (empty(), Fake::new(seconds));
        assert_eq!(chosen(&mut algorithms, &product(4096), &mut library), expected, "{seconds:?}");
        assert_eq!(library.asked, [MOST_PROPOSALS]);
        assert_eq!(library.runs.len(), (ROUNDS + 1) * seconds.len());
        assert_eq!(chosen(&mut algorithms, &product(4096), &mut library), expected);
        assert_eq!(library.runs.len(), (ROUNDS + 1) * seconds.len(), "nothing is measured twice");
    }
    // No more than were asked for.
    let mut library = Fake::new(&[5.0, 4.0, 3.0, 2.0, 9.0, 9.0, 9.0, 9.0, 1.0]);
    assert_eq!(chosen(&mut empty(), &product(4096), &mut library), 3);
}

#[test]
fn the_round_that_warms_up_does_not_count() {
    let mut library = Fake::new(&[1.0, 2.0]);
    let choice = measure(&mut library).unwrap();
    assert_eq!((choice.proposal, choice.times), (0, Some((1_010_000_000, 1_010_000_000))));
    assert_eq!(library.runs, [0, 1, 0, 1, 0, 1, 0, 1], "round by round");
}

#[test]
fn algorithms_that_fail_are_left_out_and_all_failing_is_the_first_error() {
    let mut library = Fake::new(&[1.0, 3.0, 2.0]);
    library.seconds[0] = None;
    let choice = measure(&mut library).unwrap();
    assert_eq!((choice.proposal, choice.times), (2, None), "the first has no time to compare with");
    assert_eq!(library.runs.iter().filter(|run| **run == 0).count(), 1, "it is not tried again");
    library.seconds.fill(None);
    assert_eq!(measure(&mut library).unwrap_err().message, "0 fails");
}

#[test]
fn few_tokens_take_the_first_proposal_unmeasured() {
    let mut algorithms = empty();
    let mut library = Fake::new(&[2.0, 1.0]);
    let gradient = Product { layout: Layout::Tn, m: 3072, k: LEAST_TOKENS - 1, ..product(0) };
    for product in [product(LEAST_TOKENS - 1), gradient] {
        assert_eq!(chosen(&mut algorithms, &product, &mut library), 0);
    }
    assert_eq!((library.asked, library.runs.len()), (vec![1, 1], 0));
    assert_eq!(algorithms.to_text(), None);
}

#[test]
fn numbers_of_tokens_of_one_class_share_a_choice_and_others_do_not() {
    assert_eq!([1024, 1025, 1152, 1153, 2047, 2048, 2049].map(class_of), [1024, 1152, 1152, 1280, 2048, 2048, 2304]);
    assert_eq!([15_361, 16_384, 16_385].map(class_of), [16_384, 16_384, 18_432]);
    let name = |product: &Product| product.name().unwrap();
    let base = product(16_384);
    assert_eq!(name(&base), name(&product(15_361)));
    let gradient = Product { layout: Layout::Tn, m: 3072, k: 16_384, ..base };
    assert_eq!(name(&gradient), name(&Product { k: 15_900, ..gradient }));
    let others = [
        product(16_385),
        product(15_360),
        gradient,
        Product { m: 3073, ..gradient },
        Product { layout: Layout::Nn, ..base },
        Product { n: 1025, ..base },
        Product { k: 3073, ..base },
        Product { strides: [3072, 3072, 1025], ..base },
        Product { types: [DType::Bf16, DType::Bf16, DType::F32], ..base },
        Product { accumulate: true, ..base },
        Product { bias: Some(DType::F32), ..base },
        Product { bias: Some(DType::Bf16), ..base },
        Product { alignments: [256, 256, 64], ..base },
    ];
    let names: std::collections::BTreeSet<String> = others.iter().chain([&base]).map(name).collect();
    assert_eq!(names.len(), others.len() + 1, "{names:?}");
}

#[test]
fn a_number_of_tokens_that_the_choice_does_not_take_has_the_first_and_changes_no_choice() {
    let mut algorithms = empty();
    let mut library = Fake::new(&[2.0, 1.0]);
    assert_eq!(chosen(&mut algorithms, &product(4096), &mut library), 1);
    let text = algorithms.to_text();
    library.refused = vec![1];
    assert_eq!(chosen(&mut algorithms, &product(4000), &mut library), 0);
    library.refused.clear();
    assert_eq!(chosen(&mut algorithms, &product(4001), &mut library), 1);
    assert_eq!(algorithms.to_text(), text);
}

#[test]
fn a_product_that_is_added_takes_the_choice_of_the_one_that_assigns_and_is_never_run() {
    let added = Product { accumulate: true, ..product(4096) };
    let (mut algorithms, mut library) = (empty(), Fake::new(&[2.0, 1.0]));
    chosen(&mut algorithms, &product(4096), &mut library);
    let runs = library.runs.len();
    assert_eq!(chosen(&mut algorithms, &added, &mut library), 1);
    assert_eq!(library.runs.len(), runs);
    // Where it comes first it keeps the first proposal, also once the other one is measured: the same numbers every time.
    let (mut algorithms, mut library) = (empty(), Fake::new(&[2.0, 1.0]));
    assert_eq!(chosen(&mut algorithms, &added, &mut library), 0);
    assert_eq!(library.runs.len(), 0);
    assert_eq!(chosen(&mut algorithms, &product(4096), &mut library), 1);
    assert_eq!(chosen(&mut algorithms, &added, &mut library), 0);
}

#[test]
fn a_saved_choice_wins_over_a_kept_one_and_a_kept_one_over_measuring() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Algorithms::open("GPU", 130_000, Some(folder.path()));
    let (mut run, notice) = open();
    assert_eq!(notice, None);
    let saved_before = {
        let mut other = empty();
        chosen(&mut other, &product(4096), &mut Fake::new(&[1.0, 2.0, 3.0]));
        other.to_text().unwrap()
    };
    assert_eq!(chosen(&mut run, &product(4096), &mut Fake::new(&[2.0, 1.0, 3.0])), 1);

    // Another run finds it, though now another algorithm is faster.
    let (mut later, notice) = open();
    let mut library = Fake::new(&[3.0, 2.0, 1.0]);
    assert_eq!((chosen(&mut later, &product(4096), &mut library), notice), (1, None));
    assert!(library.runs.is_empty());
    assert_eq!(later.to_text(), run.to_text());
    // What it did not use is no part of its state.
    assert_eq!(open().0.to_text(), None);

    // A run that resumes has the choices of its state, whatever is kept.
    let (mut resumed, _) = open();
    assert_eq!(resumed.restore(&saved_before), None);
    assert_eq!(chosen(&mut resumed, &product(4096), &mut library), 0);
    assert_eq!(resumed.to_text().unwrap(), saved_before);
    assert!(library.runs.is_empty());
    // And for another product what is kept, else what is fastest now.
    assert_eq!(chosen(&mut resumed, &product(8192), &mut library), 2);
}

#[test]
fn what_another_process_keeps_meanwhile_is_neither_lost_nor_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Algorithms::open("GPU", 130_000, Some(folder.path())).0;
    let (mut one, mut other) = (open(), open());
    assert_eq!(chosen(&mut one, &product(4096), &mut Fake::new(&[2.0, 1.0])), 1);
    assert_eq!(chosen(&mut other, &product(4096), &mut Fake::new(&[1.0, 2.0])), 0, "it has measured already");
    assert_eq!(chosen(&mut other, &product(8192), &mut Fake::new(&[2.0, 1.0])), 1);
    let mut third = open();
    let mut library = Fake::new(&[1.0, 2.0]);
    assert_eq!(chosen(&mut third, &product(4096), &mut library), 1);
    assert_eq!(chosen(&mut third, &product(8192), &mut library), 1);
    assert!(library.runs.is_empty());
    let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(files, ["GPU--cuBLASLt-130000.json"], "nothing else is left");
}

#[test]
fn what_is_unknown_damaged_or_of_another_gpu_or_version_is_ignored_and_reported() {
    let mut run = empty();
    chosen(&mut run, &product(4096), &mut Fake::new(&[2.0, 1.0]));
    chosen(&mut run, &product(8192), &mut Fake::new(&[2.0, 1.0]));
    let good = run.to_text().unwrap();
    assert_eq!(empty().restore(&good), None);
    let cases = [
        ("no JSON".to_owned(), "not JSON"),
        (good.replace("\"format\":1", "\"format\":9"), "format 9"),
        (
            good.replace("GPU,", "Other,"),
            "they are for \"Other, cuBLASLt 130000\", and this is \"GPU, cuBLASLt 130000\"",
        ),
        (good.replace("130000", "130100"), "cuBLASLt 130100"),
        (good.replace("choices", "chosen"), "they are missing"),
    ];
    for (text, message) in cases {
        let mut resumed = empty();
        let notice = resumed.restore(&text).unwrap();
        assert!(notice.contains(message) && notice.ends_with("results differ in bits"), "{notice}");
        let mut library = Fake::new(&[2.0, 1.0, 0.5]);
        assert_eq!(chosen(&mut resumed, &product(4096), &mut library), 2, "measured again");
    }
    // One of two is damaged: the other counts.
    let damaged = good.replacen("0123456789abcdef", "0123456789abcdez", 1);
    let mut resumed = empty();
    assert!(resumed.restore(&damaged).unwrap().contains("1 of 2 are damaged"));
    let mut library = Fake::new(&[2.0, 1.0, 0.5]);
    let both = [4096, 8192].map(|tokens| chosen(&mut resumed, &product(tokens), &mut library));
    assert_eq!(both, [2, 1]);

    // The same in the file.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("GPU--cuBLASLt-130000.json");
    std::fs::write(&file, &damaged).unwrap();
    let (_, notice) = Algorithms::open("GPU", 130_000, Some(folder.path()));
    assert!(notice.unwrap().contains("1 of 2 are damaged; they are ignored and measured again"));
    // Of another library's version there is another file.
    assert_eq!(Algorithms::open("GPU", 130_100, Some(folder.path())).1, None);
}

#[test]
fn a_folder_that_cannot_be_used_is_reported_and_choices_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (mut algorithms, notice) = Algorithms::open("GPU", 130_000, Some(&file));
    assert!(notice.unwrap().contains("measured in every run"));
    assert_eq!(chosen(&mut algorithms, &product(4096), &mut Fake::new(&[2.0, 1.0])), 1);
}

/// What an engine has its device do.
#[derive(Clone, Debug, PartialEq)]
enum Call {
    Autotune(Option<PathBuf>),
    Restore(String),
}

/// A device's choices that are only noted.
struct Noted {
    calls: Arc<Mutex<Vec<Call>>>,
    chosen: Option<String>,
}

impl MatmulAlgorithms for Noted {
    fn autotune(&mut self, cache: Option<&Path>) -> Option<String> {
        self.calls.lock().unwrap().push(Call::Autotune(cache.map(Path::to_path_buf)));
        Some("nothing is kept".into())
    }

    fn chosen(&self) -> Option<String> {
        self.chosen.clone()
    }

    fn restore(&mut self, saved: &str) -> Option<String> {
        self.calls.lock().unwrap().push(Call::Restore(saved.into()));
        Some("other bits".into())
    }
}

#[test]
fn an_engine_saves_its_devices_choices_and_restores_them_whatever_else_a_state_has() {
    let dir = deeper("window-bias", 2);
    let calls = Arc::new(Mutex::new(Vec::new()));
    let open = |chosen: Option<&str>, options: &EngineOptions| {
        let noted = Noted { calls: Arc::clone(&calls), chosen: chosen.map(str::to_owned) };
        let mut device = EmulatedDevice::default();
        device.algorithms = Some(Box::new(noted));
        Engine::open(Box::new(CudaBackend::new(device)), dir.path(), Weights::Random(7), options).unwrap()
    };
    let taken = || std::mem::take(&mut *calls.lock().unwrap());
    let tuned = EngineOptions { matmul_cache: Some("kept".into()), ..options(DType::Bf16, Recompute::Norms, 33) };
    let fixed = EngineOptions { matmul_autotune: false, ..tuned.clone() };
    let inference = EngineOptions { inference_only: true, ..tuned.clone() };

    let text = r#"{"any": "text"}"#;
    let mut engine = open(Some(text), &tuned);
    let notice = engine.notice().unwrap();
    assert!(notice.contains("heads of 8 elements") && notice.ends_with("; nothing is kept"), "{notice}");
    assert_eq!(taken(), [Call::Autotune(Some("kept".into()))]);
    let (with, without) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    engine.save_state(with.path()).unwrap();
    let mut plain = open(None, &fixed);
    plain.save_state(without.path()).unwrap();
    open(None, &inference);
    assert_eq!(taken(), [], "neither is to measure");

    assert_eq!(plain.restore_state(with.path()).unwrap().as_deref(), Some("other bits"));
    assert_eq!(taken(), [Call::Restore(text.into())]);
    // A state without choices, as earlier versions and the CPU write them.
    assert_eq!(engine.restore_state(without.path()).unwrap(), None);
    let mut cpu = Engine::open(Box::new(CpuBackend::new()), dir.path(), Weights::Random(7), &tuned).unwrap();
    assert_eq!(cpu.restore_state(with.path()).unwrap(), None);
    assert_eq!(taken(), []);
}
