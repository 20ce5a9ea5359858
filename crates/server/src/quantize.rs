//! `baton quantize`: saves a checkpoint with its linear layers quantised, and prints the new folder. Served, it gives
//! what `baton serve --quantize` gives with the original.

use std::path::PathBuf;

use anyhow::{Context, Result};
use baton_device::WeightFormat;
use baton_model::Quantization;
use clap::Args;
use indicatif::{HumanBytes, ProgressBar};

use crate::{load, pull, settings::Quantize};

/// What `baton quantize` takes.
#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// Checkpoint folder in Hugging Face layout, else an id as for `baton pull`
    #[arg(value_name = "MODEL")]
    model: String,

    /// Format of the linear layers
    #[arg(long, value_enum, value_name = "FORMAT")]
    quantize: Quantize,

    /// Folder to write, which must not exist
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

/// Runs the command.
pub fn main(args: &QuantizeArgs) -> Result<()> {
    let (name, files) = load::files(Some(&args.model))?;
    let bar = ProgressBar::no_length().with_style(pull::bar_style());
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let quantization = Quantization::from(args.quantize);
    let converted = baton_model::quantize(&files, quantization, &args.out, &progress);
    bar.finish_and_clear();
    let converted = converted.with_context(|| format!("model {name}"))?;
    if let Some(worst) = converted.iter().max_by(|a, b| a.max_abs_error.total_cmp(&b.max_abs_error)) {
        let (before, after) = converted.iter().fold((0, 0), |(b, a), c| (b + c.bytes_before, a + c.bytes_after));
        eprintln!(
            "{} tensors converted, {} to {}; largest error {} in {}, {} to {}",
            converted.len(),
            HumanBytes(before),
            HumanBytes(after),
            worst.max_abs_error,
            worst.tensor,
            worst.from,
            worst.to
        );
        let others = converted.iter().filter(|c| c.to != WeightFormat::Ggml(quantization.format())).count();
        if others > 0 {
            eprintln!("{others} of them are kept in a wider format, since their rows are not whole blocks");
        }
    }
    #[allow(clippy::print_stdout)] // what was asked for
    {
        println!("{}", args.out.display());
    }
    Ok(())
}
