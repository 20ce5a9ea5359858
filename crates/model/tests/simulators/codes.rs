//! Checkpoints of codes under scales on a device that keeps codes: what is stored is what is multiplied, on one device and on several,
//! and reports say so. `quantized` of the model's other tests has what the layouts mean.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::common::{QUANTIZED, folder, generate, options};
use crate::cuda::Simulator;
use baton_device::{Code, DType, Reference, WeightFormat};
use baton_device_cuda::CudaBackend;
use baton_model::{Files, LoadOptions, LoadReport, Runner, SampledToken, SamplingParams, load, load_ranks};

/// Sums in f32 of the same products in another order, of which log-probabilities are made.
const SUMS: f32 = 1e-4;
const TIMEOUT: Duration = Duration::from_secs(300);
const PROMPT: [u32; 6] = [1, 2, 3, 4, 5, 7];

fn files(case: &str) -> Files {
    let folder = if case.starts_with("deepseek") { folder(case) } else { folder("quantized").join(case) };
    Files::folder(folder).unwrap()
}

/// The judge, as a device that keeps codes.
fn judge() -> Reference {
    Reference::new().saying(|caps| caps.weight_formats.extend(Code::ALL.map(WeightFormat::Coded)))
}

fn judged(case: &str) -> LoadReport {
    load(judge(), &files(case), &options()).unwrap().1
}

#[test]
fn reports_say_that_codes_are_kept() {
    for case in QUANTIZED {
        let report = judged(case);
        let widened = LoadOptions { dtype: Some(DType::F32), ..options() };
        let (_, in_f32) = load(Reference::new(), &files(case), &widened).unwrap();
        assert_eq!(report.conversions.len(), 7, "{case}");
        for c in &report.conversions {
            assert!(matches!(c.to, WeightFormat::Coded(_)), "{case}: {c:?}");
            assert_eq!((c.max_abs_error, c.mean_abs_error, c.bytes_after), (0.0, 0.0, c.bytes_before), "{case}");
        }
        let (_, in_bf16) = load(Reference::new(), &files(case), &options()).unwrap();
        let saved: u64 = in_bf16.conversions.iter().map(|c| c.bytes_after - c.bytes_before).sum();
        assert!(saved > 0 && report.weight_bytes + saved == in_bf16.weight_bytes, "{case}");
        // Another type is asked for, or the device keeps no codes.
        for widened in [in_f32, in_bf16] {
            assert!(!widened.weight_formats.iter().any(|format| matches!(format, WeightFormat::Coded(_))), "{case}");
        }
    }
    let report = judged("deepseek-v3-fp8");
    assert!(report.weight_formats.contains(&WeightFormat::Coded(Code::E4M3)), "{:?}", report.weight_formats);
}

/// Greedy tokens, with the log-probability of every token.
fn told(runner: &mut dyn Runner) -> Vec<SampledToken> {
    let params = SamplingParams { logprobs: Some(runner.spec().vocab_size as u32), ..SamplingParams::greedy() };
    generate(runner, &PROMPT, params, 4)
}

fn by_id(token: &SampledToken) -> BTreeMap<u32, f32> {
    token.top.iter().copied().collect()
}

/// That simulated GPUs say of a case what the judge says.
fn agree(simulator: &Simulator, case: &str, ranks: &[u32]) {
    simulator.control("devices=2");
    let (mut runner, report) = load(judge(), &files(case), &options()).unwrap();
    let expected = told(&mut runner);
    let gpus = CudaBackend::ranks(&crate::cuda::options(DType::F32), ranks).unwrap();
    let (actual, own) = match <[_; 1]>::try_from(gpus) {
        Ok([gpu]) => {
            let (mut runner, report) = load(gpu, &files(case), &options()).unwrap();
            (told(&mut runner), report)
        }
        Err(gpus) => {
            let (mut ranks, report) = load_ranks(gpus, &files(case), &options(), TIMEOUT).unwrap();
            (told(&mut ranks), report)
        }
    };
    assert_eq!(actual.len(), expected.len(), "{case} on {ranks:?}");
    for (actual, expected) in actual.iter().zip(&expected) {
        assert_eq!(actual.token, expected.token, "{case} on {ranks:?}");
        let (actual, expected) = (by_id(actual), by_id(expected));
        assert_eq!(actual.len(), expected.len(), "{case} on {ranks:?}");
        for (id, a) in &actual {
            let e = expected[id];
            assert!((a - e).abs() <= SUMS, "{case} on {ranks:?}: {a} for {e} of token {id}");
        }
    }
    assert_eq!((&own.weight_formats, own.weight_bytes), (&report.weight_formats, report.weight_bytes), "{case}");
}

/// Columns in the order of activations; blocks of two dimensions, experts and latents.
#[test]
fn a_simulated_gpu_multiplies_what_is_stored() {
    let Some(simulator) = Simulator::new() else { return };
    agree(&simulator, "gptq-int4-shuffled", &[0]);
    agree(&simulator, "deepseek-v3-fp8", &[0]);
}

/// A cut leaves some columns of each group.
#[test]
fn ranks_multiply_their_share_of_what_is_stored() {
    let Some(simulator) = Simulator::new() else { return };
    agree(&simulator, "gptq-int4-shuffled", &[0, 1]);
}

#[test]
#[ignore = "minutes in the emulator: cargo xtask long gpu"]
fn every_layout_is_multiplied_as_it_is_stored_on_one_simulated_gpu_and_on_two() {
    let Some(simulator) = Simulator::new() else { return };
    for case in QUANTIZED.iter().chain(&["deepseek-v3-fp8"]) {
        agree(&simulator, case, &[0]);
        agree(&simulator, case, &[0, 1]);
    }
}
