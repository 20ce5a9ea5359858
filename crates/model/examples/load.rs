//! Loads a checkpoint some times, beside the least that any loader must do: read its files, and fill as many
//! bytes of memory not touched before. Prints seconds of the clock and of all cores, and memory.
//!
//! `cargo run --release -p baton-model --example load -- CHECKPOINT [RUNS] [bf16|f16|f32|q8_0]`

#![allow(clippy::print_stdout, missing_docs)]

use std::error::Error;
use std::fs::{self, File};
use std::hint::black_box;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

use baton_device::{BlockFormat, DType};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_model::{Files, KvCacheSize, LoadOptions, load};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("which checkpoint?")?;
    let runs: usize = args.next().map_or(Ok(3), |runs| runs.parse())?;
    let (dtype, quantization) = match args.next().as_deref() {
        None => (None, None),
        Some("bf16") => (Some(DType::BF16), None),
        Some("f16") => (Some(DType::F16), None),
        Some("f32") => (Some(DType::F32), None),
        Some("q8_0") => (None, Some(BlockFormat::Q8_0)),
        Some(other) => return Err(format!("{other}: bf16, f16, f32 or q8_0").into()),
    };
    let options = LoadOptions {
        dtype,
        quantization,
        max_model_len: Some(16),
        max_step_tokens: 16,
        max_step_sequences: 1,
        kv_cache: KvCacheSize::AtMost(64 << 20),
        ..LoadOptions::default()
    };
    let files = Files::at(&path)?;
    for _ in 0..runs {
        let read = timed(|| read_all(Path::new(&path)))?;
        let mut bytes = 0;
        let mut memory = (0, 0);
        let loaded = timed(|| {
            fs::write("/proc/self/clear_refs", "5")?; // the peak of memory begins anew
            let backend = CpuBackend::new(&CpuOptions { threads: 0, isa: None })?;
            let (runner, report) = load(backend, &files, &options)?;
            memory = (status("VmHWM")?, status("VmRSS")?);
            bytes = report.weight_bytes;
            drop(black_box(runner));
            Ok(())
        })?;
        let filled = timed(|| {
            drop(black_box(vec![1u8; bytes as usize]));
            Ok(())
        })?;
        let (peak, rest) = memory;
        println!(
            "weights {} MB, peak {} MB above the end | read {read} | fill as many bytes {filled} | load {loaded}",
            bytes >> 20,
            (peak - rest) >> 20,
        );
    }
    Ok(())
}

/// Reads the weights as `cat` does.
fn read_all(path: &Path) -> Result<(), Box<dyn Error>> {
    let files =
        if path.is_dir() { fs::read_dir(path)?.map(|e| Ok(e?.path())).collect() } else { Ok(vec![path.into()]) };
    let mut buffer = vec![0; 1 << 20];
    for file in files.map_err(|e: std::io::Error| e)? {
        let mut file = File::open(file)?;
        while file.read(&mut buffer)? > 0 {}
    }
    Ok(())
}

/// Seconds of the clock, and of this process on all cores.
fn timed(run: impl FnOnce() -> Result<(), Box<dyn Error>>) -> Result<String, Box<dyn Error>> {
    let (start, before) = (Instant::now(), cores()?);
    run()?;
    Ok(format!("{:.2} s ({:.2} s of all cores)", start.elapsed().as_secs_f64(), cores()? - before))
}

fn cores() -> Result<f64, Box<dyn Error>> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().ok_or("no fields")?.split_whitespace().collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

/// A line of this process's status, in bytes.
fn status(name: &str) -> Result<u64, Box<dyn Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix(name)).ok_or("no such line")?;
    Ok(line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
