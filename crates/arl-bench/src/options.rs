//! The command's options. Knows the names of checks and cases, to refuse others.

use std::path::PathBuf;

use arl_engine::AttentionChoice;

use crate::{checks, times};

/// What `--help` prints.
pub const HELP: &str = "gpu: checks the engine on a GPU against the CPU's, then times it. One JSON line a check and a case.

  gpu [--only NAME,...] [--budget SECONDS] [--profile] [--python PATH] [--device cuda] [--rehearse]
      [--attention own] [--logits-16bit]

  --device NAME     cuda (the first that can be used), cuda:N, cpu, or emulated: the kernels on the host, checks alone
  --only NAMES      these checks or cases alone, with commas between; before a case all checks run. --list names them
  --budget SECONDS  nothing is begun that would take longer; 570 where nothing is said
  --shapes N        random shapes a leaf in each type; 50 where nothing is said
  --steps N         timed steps a case, after two others; 6 where nothing is said
  --keep-going      names what is wrong and continues; each family of checks, and the cases, in a process of its own
  --part WHICH      checked or unchecked: cases alone, after checks in another run that passed, or did not
  --host-gib N      host memory that offloads may take; else what the machine has, less 2 GiB
  --profile         each leaf's share of a step, next to the rates measured in the same run, in place of times
  --count           without a device: each leaf's operations and bytes, and the least time that an H100's data sheet allows
  --attention WHO   own (the default), cudnn, or auto: cuDNN where it can be used; then attention by it is checked first
  --logits-16bit    the loss's logits in bf16 where activations are, as the option logits_16bit of `arl train`
  --python PATH     a Python with torch and transformers for the peer; else that of VIRTUAL_ENV or PATH; `none`: no peer
  --rehearse        the same with tiny models, to see that all of it runs; its times mean nothing
  --list            the names of all checks and cases

It ends with 0 where all checks passed and every case ran, 1 where a number was wrong, 2 on a wrong option, 3 where CUDA
cannot be used (it says what is missing), 4 where a case ran past its limit.

ARL_CUDA_SYNC=1 names the operation at which a GPU fails; ARL_FATBIN=FILE takes the kernels from a file.";

/// Who may compute attention, as `--attention` and the option of `arl train` name it.
const ATTENTION: [(&str, AttentionChoice); 3] =
    [("own", AttentionChoice::Own), ("auto", AttentionChoice::Auto), ("cudnn", AttentionChoice::Cudnn)];

/// A part of a run in a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Checks.
    Checks,
    /// Cases, all checks before which passed, here or in a run before.
    Checked,
    /// Cases after checks of which some failed.
    Unchecked,
}

/// As `--part` names them.
const PARTS: [(&str, Part); 3] = [("checks", Part::Checks), ("checked", Part::Checked), ("unchecked", Part::Unchecked)];

/// The word for who computes attention.
pub(crate) fn word(choice: AttentionChoice) -> &'static str {
    ATTENTION.iter().find(|(_, other)| *other == choice).map_or("own", |(word, _)| word)
}

/// The options of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// As `--device` names it.
    pub device: String,
    /// Names of checks and cases; empty: all.
    pub only: Vec<String>,
    /// Seconds for everything.
    pub budget: u64,
    /// Random shapes a leaf.
    pub shapes: usize,
    /// Timed steps a case.
    pub steps: usize,
    /// Whether to continue after what is wrong.
    pub keep_going: bool,
    /// A process that does a part of the work: [`Part`]. It checks nothing before a case.
    pub part: Option<Part>,
    /// GiB of host memory that offloads may take.
    pub host_gib: Option<u64>,
    /// Shares of leaves instead of times.
    pub profile: bool,
    /// What a step is made of, counted instead of run.
    pub count: bool,
    /// Who computes attention.
    pub attention: AttentionChoice,
    /// The loss's logits in the type of the activations.
    pub logits_16bit: bool,
    /// The peer's Python; `None`: to be found.
    pub python: Option<String>,
    /// Tiny models.
    pub rehearse: bool,
    /// Names alone.
    pub list: bool,
    /// How the command is used, and nothing else.
    pub help: bool,
    /// The folder with `configs`, `golden` and the peer.
    pub home: PathBuf,
    /// The words that these come from.
    pub command: Vec<String>,
}

impl Options {
    /// From the words of the command. `home`: its own folder. Fails with a sentence.
    pub fn parse(words: &[String], home: PathBuf) -> Result<Self, String> {
        let mut options = Options {
            device: "cuda".into(),
            only: Vec::new(),
            budget: 570,
            shapes: 50,
            steps: 6,
            keep_going: false,
            part: None,
            host_gib: None,
            profile: false,
            count: false,
            attention: AttentionChoice::Own,
            logits_16bit: false,
            python: None,
            rehearse: false,
            list: false,
            help: false,
            home,
            command: words.to_vec(),
        };
        let mut words = words.iter();
        while let Some(flag) = words.next() {
            let mut value = || words.next().cloned().ok_or(format!("{flag} needs a value"));
            let number = |text: String| match text.parse::<u64>() {
                Ok(number) if number > 0 => Ok(number),
                _ => Err(format!("{flag} is a whole number above 0, not `{text}`")),
            };
            match flag.as_str() {
                "--device" => options.device = value()?,
                "--only" => options.only.extend(value()?.split(',').filter(|n| !n.is_empty()).map(str::to_string)),
                "--budget" => options.budget = number(value()?)?,
                "--shapes" => options.shapes = number(value()?)? as usize,
                "--steps" => options.steps = number(value()?)? as usize,
                "--keep-going" => options.keep_going = true,
                "--part" => {
                    let asked = value()?;
                    let known = PARTS.iter().find(|(word, _)| *word == asked);
                    options.part =
                        Some(known.ok_or(format!("--part is checks, checked or unchecked, not `{asked}`"))?.1);
                }
                "--host-gib" => options.host_gib = Some(number(value()?)?),
                "--profile" => options.profile = true,
                "--count" => options.count = true,
                "--attention" => {
                    let asked = value()?;
                    let known = ATTENTION.iter().find(|(word, _)| *word == asked);
                    options.attention = known.ok_or(format!("--attention is own, auto or cudnn, not `{asked}`"))?.1;
                }
                "--logits-16bit" => options.logits_16bit = true,
                "--python" => options.python = Some(value()?),
                "--rehearse" => options.rehearse = true,
                "--list" => options.list = true,
                "--help" | "-h" => options.help = true,
                "--home" => options.home = PathBuf::from(value()?),
                _ => return Err(format!("{flag} is no option; --help names them")),
            }
        }
        let known = |device: &str| matches!(device, "cpu" | "cuda" | "emulated");
        let numbered = options.device.strip_prefix("cuda:").is_some_and(|n| n.parse::<u32>().is_ok());
        if !known(&options.device) && !numbered {
            return Err(format!("--device is cuda, cuda:0 and on, cpu or emulated, not `{}`", options.device));
        }
        let names = Options::names();
        if let Some(name) = options.only.iter().find(|name| !names.contains(&name.as_str())) {
            return Err(format!("--only {name}: there are {}", names.join(", ")));
        }
        if options.only.iter().any(|name| name == checks::LIBRARY) && options.attention == AttentionChoice::Own {
            return Err(format!(
                "--only {}: it checks the library that --attention cudnn or auto asks for",
                checks::LIBRARY
            ));
        }
        Ok(options)
    }

    /// The names of all checks and cases.
    pub fn names() -> Vec<&'static str> {
        checks::NAMES.into_iter().chain(times::names()).collect()
    }

    /// Whether a check is to be run: it is named, or anything is to be timed. What is timed must have been checked.
    pub(crate) fn checks(&self, name: &str) -> bool {
        let case = |only: &String| times::names().contains(&only.as_str());
        if name == checks::LIBRARY && self.attention == AttentionChoice::Own {
            return false;
        }
        self.only.is_empty() || self.only.iter().any(|only| only == name || (case(only) && self.part.is_none()))
    }

    /// Whether a case is to be timed: it is named, or nothing is.
    pub(crate) fn times(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Options, String> {
        let words: Vec<String> = words.split_whitespace().map(str::to_string).collect();
        Options::parse(&words, PathBuf::new())
    }

    #[test]
    fn words_become_options() {
        let options = parse("--only loss,context --budget 60 --device cuda:1 --profile --python none").unwrap();
        assert_eq!((options.budget, options.device.as_str(), options.profile), (60, "cuda:1", true));
        assert!(options.times("loss") && options.times("context") && !options.times("qwen3-4b"));
        assert_eq!(options.python.as_deref(), Some("none"));
        assert!(!options.logits_16bit && parse("--count --logits-16bit").unwrap().logits_16bit);
        assert_eq!(options.attention, AttentionChoice::Own);
        for (name, choice) in ATTENTION {
            assert_eq!(parse(&format!("--attention {name}")).unwrap().attention, choice);
            assert_eq!(word(choice), name);
        }
    }

    #[test]
    fn what_is_timed_is_checked_before() {
        assert!(checks::NAMES.into_iter().all(|check| parse("--only loss --attention auto").unwrap().checks(check)));
        // The own kernels' attention is a leaf.
        let own = parse("--only loss,golden").unwrap();
        assert!(checks::NAMES.into_iter().all(|check| own.checks(check) == (check != checks::LIBRARY)));
        let leaves = parse("--only leaves").unwrap();
        assert!(leaves.checks("leaves") && !leaves.checks("golden") && !leaves.times("loss"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (words, message) in [
            ("--onyl x", "--onyl is no option"),
            ("--only lots", "--only lots: there are attention, leaves"),
            ("--budget soon", "whole number above 0, not `soon`"),
            ("--steps 0", "whole number above 0, not `0`"),
            ("--device tpu", "not `tpu`"),
            ("--python", "--python needs a value"),
            ("--only attention", "it checks the library"),
            ("--attention flash", "own, auto or cudnn, not `flash`"),
        ] {
            let error = parse(words).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }
}
