//! What a manifest must fulfil beyond its types. Every breach is reported, up to a bound.

use std::collections::BTreeSet;

use crate::manifest::{Case, Manifest, ManifestError, Tolerances};
use crate::strict::shown;
use crate::{MANIFEST, SIGNATURE, names};

/// Most files of a bundle.
pub(crate) const MAX_FILES: usize = 1 << 16;
/// Most tensors of a bundle.
pub(crate) const MAX_TENSORS: usize = 1 << 18;
/// Most golden cases of a bundle.
pub(crate) const MAX_CASES: usize = 1 << 13;
const MAX_RANK: usize = 8;
/// Longest name and longest passed-through word, in bytes.
const MAX_TEXT: usize = 1024;
/// Problems listed in one message, at most.
const MAX_PROBLEMS: usize = 20;
/// Log-probabilities are rounded to six decimals, so one of 0 may have become this.
const ROUNDING: f64 = 1e-6;
/// By how much the probabilities of a few tokens may exceed 1 together, however they were rounded.
const MASS_SLACK: f64 = 1e-3;
const DTYPES: [&str; 3] = ["float32", "bfloat16", "float16"];

/// Fails with every rule that is broken.
pub(crate) fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    let mut problems = Problems::default();
    problems.facts(manifest);
    problems.files(manifest);
    problems.tensors(manifest);
    problems.tolerances(manifest);
    problems.cases(&manifest.cases);
    let Problems { listed, more } = problems;
    if listed.is_empty() { Ok(()) } else { Err(ManifestError::Invalid { problems: listed, more }) }
}

#[derive(Default)]
struct Problems {
    listed: Vec<String>,
    more: usize,
}

impl Problems {
    fn unless(&mut self, holds: bool, message: impl FnOnce() -> String) {
        if holds {
            return;
        }
        if self.listed.len() < MAX_PROBLEMS {
            self.listed.push(message());
        } else {
            self.more += 1;
        }
    }

    /// A text that is shown as it is.
    fn text(&mut self, place: &str, text: &str) {
        let plain = !text.is_empty() && text.len() <= MAX_TEXT && !text.chars().any(char::is_control);
        self.unless(plain, || format!("{place} is empty, longer than {MAX_TEXT} bytes, or has control characters"));
    }

    fn facts(&mut self, manifest: &Manifest) {
        let Manifest { model, trained, computed, requires, .. } = manifest;
        self.text("model.name", &model.name);
        let optional = [
            ("model.license", &model.license),
            ("trained.framework", &trained.framework),
            ("trained.commit", &trained.commit),
            ("computed.framework", &computed.framework),
            ("computed.device", &computed.device),
        ];
        for (place, text) in optional {
            text.iter().for_each(|text| self.text(place, text));
        }
        for (place, dtype) in [("trained.dtype", &trained.dtype), ("computed.dtype", &computed.dtype)] {
            self.unless(DTYPES.contains(&dtype.as_str()), || {
                format!("{place} is \"{}\", not one of {}", shown(dtype), DTYPES.join(", "))
            });
        }
        if let Some(word) = &trained.quantization {
            let plain = (1..=64).contains(&word.len())
                && word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
            self.unless(plain, || format!("trained.quantization is \"{}\", not a word", shown(word)));
        }
        let distinct: BTreeSet<_> = requires.iter().collect();
        self.unless(distinct.len() == requires.len(), || "requires has a word twice".into());
    }

    fn files(&mut self, manifest: &Manifest) {
        let files = &manifest.files;
        self.unless(!files.is_empty(), || "files is empty".into());
        self.unless(files.len() <= MAX_FILES, || format!("files has {} entries, at most {MAX_FILES}", files.len()));
        for name in files.keys() {
            let own = [MANIFEST, SIGNATURE].contains(&name.as_str()).then_some("is the manifest's or its signature's");
            let objection = names::objection(name).or(own);
            self.unless(objection.is_none(), || {
                format!("file name \"{}\" {}", shown(name), objection.unwrap_or_default())
            });
            let folder = name.match_indices('/').map(|(at, _)| &name[..at]).find(|folder| files.contains_key(*folder));
            self.unless(folder.is_none(), || format!("{} is a file and a folder", shown(folder.unwrap_or_default())));
        }
        let generation = Manifest::generation_of(files);
        self.unless(manifest.generation == generation, || {
            format!("generation is {}, but the files listed give {generation}", manifest.generation)
        });
    }

    fn tensors(&mut self, manifest: &Manifest) {
        let tensors = &manifest.tensors;
        self.unless(tensors.len() <= MAX_TENSORS, || {
            format!("tensors has {} entries, at most {MAX_TENSORS}", tensors.len())
        });
        for (name, tensor) in tensors {
            self.text("the name of a tensor", name);
            let dtype = (1..=16).contains(&tensor.dtype.len())
                && tensor.dtype.bytes().all(|b| matches!(b, b'A'..=b'Z' | b'0'..=b'9' | b'_'));
            self.unless(dtype, || {
                format!("tensor {} has dtype \"{}\"; safetensors writes BF16", shown(name), shown(&tensor.dtype))
            });
            self.unless(tensor.shape.len() <= MAX_RANK, || {
                format!("tensor {} has {} dimensions, at most {MAX_RANK}", shown(name), tensor.shape.len())
            });
        }
    }

    fn tolerances(&mut self, manifest: &Manifest) {
        for (class, bounds) in &manifest.tolerances {
            let values = bounds.values();
            for (field, value) in values {
                self.unless(value.is_finite() && value >= 0.0, || {
                    format!("tolerances of {class}: {field} is {value}, not a finite number from 0")
                });
            }
            let Tolerances {
                max_abs_logprob_diff: max, mean_abs_logprob_diff: mean, p99_abs_logprob_diff: p99, ..
            } = bounds;
            self.unless(mean <= max, || {
                format!("tolerances of {class}: the mean difference {mean} exceeds the maximum {max}")
            });
            self.unless(p99 <= max, || {
                format!("tolerances of {class}: the 99th percentile {p99} exceeds the maximum {max}")
            });
            self.unless(bounds.top1_agreement <= 1.0, || {
                format!("tolerances of {class}: top1_agreement is {}, more than 1", bounds.top1_agreement)
            });
            self.unless(bounds.perplexity_ratio >= 1.0, || {
                format!("tolerances of {class}: perplexity_ratio is {}, less than 1", bounds.perplexity_ratio)
            });
        }
        let classes: Vec<_> = manifest.tolerances.iter().collect();
        for pair in classes.windows(2) {
            let [(fine, bounds), (coarse, wider)] = pair else { continue };
            for ((field, value), (_, wide)) in bounds.values().into_iter().zip(wider.values()) {
                // Agreement is the one that shrinks where more is tolerated.
                let within = if field == "top1_agreement" { value >= wide } else { value <= wide };
                self.unless(within, || {
                    format!("tolerances of {fine}: {field} {value} allows more than the coarser {coarse} with {wide}")
                });
            }
        }
    }

    fn cases(&mut self, cases: &[Case]) {
        self.unless(!cases.is_empty(), || "cases is empty: nothing would be compared".into());
        self.unless(cases.len() <= MAX_CASES, || format!("cases has {} entries, at most {MAX_CASES}", cases.len()));
        let mut seen = BTreeSet::new();
        for case in cases {
            self.text("the name of a case", &case.name);
            self.unless(seen.insert(&case.name), || format!("the name of case {} occurs twice", shown(&case.name)));
            self.case(case);
        }
        let lists = || cases.iter().flat_map(|case| case.top.values());
        self.unless(cases.is_empty() || lists().next().is_some(), || "no case has a position in top".into());
        let k = lists().next().map_or(2, Vec::len);
        self.unless(k >= 2, || format!("top has lists of {k}; at least two tokens are needed"));
        for (case, position, list) in cases.iter().flat_map(|c| c.top.iter().map(move |(p, list)| (c, p, list))) {
            self.unless(list.len() == k, || {
                format!(
                    "case {}: top at {position} has {} tokens, the first list has {k}",
                    shown(&case.name),
                    list.len()
                )
            });
        }
    }

    fn case(&mut self, case: &Case) {
        let Case { prompt_ids, greedy_ids, margins, logprobs, .. } = case;
        let place = || format!("case {}", shown(&case.name));
        let ids = prompt_ids.len() + greedy_ids.len();
        self.unless(!prompt_ids.is_empty(), || format!("{}: prompt_ids is empty", place()));
        self.unless(margins.len() == greedy_ids.len(), || {
            format!("{}: {} margins for {} greedy_ids", place(), margins.len(), greedy_ids.len())
        });
        self.unless(logprobs.len() == ids.saturating_sub(1), || {
            format!("{}: {} logprobs, but {ids} ids have {}", place(), logprobs.len(), ids.saturating_sub(1))
        });
        let margin = margins.iter().find(|m| !(m.is_finite() && **m >= 0.0));
        self.unless(margin.is_none(), || {
            format!("{}: a margin is {}, not a number from 0", place(), margin.unwrap_or(&0.0))
        });
        let logprob = logprobs.iter().find(|l| !is_logprob(**l));
        self.unless(logprob.is_none(), || format!("{}: a logprob is {}, above 0", place(), logprob.unwrap_or(&0.0)));
        if let Some(chat) = &case.chat {
            self.unless(case.prompt.is_some(), || format!("{}: a chat needs the prompt that it renders to", place()));
            self.unless(!chat.messages.is_empty(), || format!("{}: the chat has no messages", place()));
            let objects = chat.messages.iter().chain(&chat.tools).all(serde_json::Value::is_object);
            self.unless(objects, || format!("{}: a message or a tool is not an object", place()));
        }
        for (position, list) in &case.top {
            let place = || format!("{}: top at {position}", place());
            self.unless((*position as usize) < ids, || format!("{} lies behind its {ids} ids", place()));
            let logprob = list.iter().find(|(_, l)| !is_logprob(*l));
            self.unless(logprob.is_none(), || {
                format!("{} has the logprob {}, above 0", place(), logprob.map_or(0.0, |pair| pair.1))
            });
            self.unless(list.is_sorted_by(|a, b| a.1 >= b.1), || format!("{} is not sorted, best first", place()));
            let distinct: BTreeSet<_> = list.iter().map(|(id, _)| id).collect();
            self.unless(distinct.len() == list.len(), || format!("{} has an id twice", place()));
            let mass: f64 = list.iter().map(|(_, l)| l.exp()).sum();
            self.unless(mass <= 1.0 + MASS_SLACK, || format!("{} has a probability of {mass:.6} in all", place()));
        }
    }
}

fn is_logprob(value: f64) -> bool {
    value.is_finite() && value <= ROUNDING
}
