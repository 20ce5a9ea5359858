//! Tensor by tensor from checkpoint to device: map, check, hash, prepare, release.
//!
//! Invariants: a tensor's file pages are mapped only while it is prepared, and of a layer's experts only one
//! at a time; every weight that reaches the device is finite; every change of precision is recorded, measured
//! while the device reads the rows, so that they are computed once. The first rank sees every tensor whole, checks it and
//! adds it to the digest, also what other ranks keep; those see what they have a share of.

mod experts;
mod table;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::Range;

use baton_device::{
    Backend, Caps, DType, HostLatent, HostLinear, HostTensor, LatentOps, Purpose, Result as DeviceResult, RowSource,
    WeightFormat, World,
};
use sha2::{Digest, Sha256};

use crate::LoadError;
use crate::arch::{self, Projection};
use crate::checkpoint::{Checkpoint, CheckpointError, Part, Role, TensorSpec};
use crate::precision::{self, Conversion, Measured, Quantization, StoredRows};
use crate::quant::{Encoding, Values};
use crate::split::{Columns, Split};

/// Above this many bytes of weights the digest covers only the beginning of each tensor.
const HASH_ALL_BELOW: u64 = 256 << 20;
/// Bytes of each tensor that the digest covers then.
const HASH_PREFIX: usize = 4096;

/// How weights shall be kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Formats {
    /// Float type of what is not quantised; `None` for as stored.
    pub(crate) dtype: Option<DType>,
    /// Form of what may be quantised, where its blocks divide the rows; `None` for no quantisation.
    pub(crate) quantized: Option<Quantization>,
}

impl Formats {
    /// The format of every tensor of a verified checkpoint that is no table, by name. Unless something else is asked for, a
    /// matrix is kept as it is stored if the device keeps that, blocks and codes included, else in the device's type of activations. Codes that it does
    /// not keep are widened to that, too, or to bf16 where that is f32 and the device has bf16. So are those that do not
    /// [lie in runs](Encoding::lies_in_runs). The experts of a projection are kept alike. Routers are f32: they are small, and a
    /// device may make activations narrow for other formats, which can choose other experts.
    pub(crate) fn resolve(
        self,
        specs: &BTreeMap<String, TensorSpec>,
        checkpoint: &Checkpoint,
        caps: &Caps,
    ) -> BTreeMap<String, WeightFormat> {
        let mut alike: BTreeMap<String, Vec<&TensorSpec>> = BTreeMap::new();
        for spec in specs.values().filter(|spec| spec.role != Role::Table) {
            alike.entry(arch::without_expert(&spec.name)).or_default().push(spec);
        }
        let formats = alike.values().flat_map(|specs| {
            let format = self.of_all(specs, checkpoint, caps);
            specs.iter().map(move |spec| (spec.name.clone(), format))
        });
        formats.collect()
    }

    /// The format of matrices of one shape that are kept alike: codes only if all lie in the same way, and f32, which holds
    /// them all, where stored types are mixed.
    fn of_all(self, specs: &[&TensorSpec], checkpoint: &Checkpoint, caps: &Caps) -> WeightFormat {
        let first = specs[0];
        let alike = specs.iter().all(|spec| spec.encoding == first.encoding);
        if let Some(codes) = self.codes(first, caps).filter(|_| alike) {
            return codes;
        }
        let format = self.without_codes(first, checkpoint, caps);
        let is_all = specs.iter().all(|spec| self.without_codes(spec, checkpoint, caps) == format);
        if is_all { format } else { WeightFormat::F32 }
    }

    /// The codes as which a matrix is kept, if it is.
    fn codes(self, spec: &TensorSpec, caps: &Caps) -> Option<WeightFormat> {
        if spec.role != Role::Linear || self.quantized.is_some() || self.dtype.is_some() {
            return None;
        }
        let in_runs = |own: &&Encoding| own.lies_in_runs(spec.matrix()[1], arch::is_expert(&spec.name));
        let codes = WeightFormat::Coded(spec.encoding.as_ref().filter(in_runs)?.code()?);
        caps.weight_formats.contains(&codes).then_some(codes)
    }

    /// The format of a matrix that is not kept as codes.
    fn without_codes(self, spec: &TensorSpec, checkpoint: &Checkpoint, caps: &Caps) -> WeightFormat {
        let keeps = |dtype: DType| caps.weight_formats.contains(&dtype.into());
        let stored = || {
            let stored = match &spec.encoding {
                None => checkpoint.dtype(&spec.name),
                Some(Encoding::Blocks(blocks)) => DType::Ggml(blocks.of(spec.matrix()[1])),
                Some(_) if caps.activations == DType::F32 && keeps(DType::BF16) => DType::BF16,
                Some(_) => caps.activations,
            };
            if keeps(stored) { stored } else { caps.activations }
        };
        let float = || self.dtype.unwrap_or_else(stored).into();
        match spec.role {
            Role::Linear => match self.quantized {
                Some(wanted) => WeightFormat::Ggml(wanted.format().made_for(spec.matrix()[1])),
                None => float(),
            },
            Role::Float => float(),
            Role::Router | Role::Vector => WeightFormat::F32,
            Role::Table => unreachable!("{} has no format", spec.name),
        }
    }
}

/// Bytes of so many elements that take `stored` in the checkpoint; of codes as many as there.
pub(crate) fn kept(format: WeightFormat, elements: usize, stored: u64) -> u64 {
    match format {
        WeightFormat::Coded(_) => stored,
        format => format.bytes(elements) as u64,
    }
}

/// A linear layer that adapters can change, or one of the parts in which a fused one is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Its name in the checkpoint: the tensor's without `.weight`.
    pub(crate) module: String,
    /// The module's outputs and inputs.
    pub(crate) shape: [usize; 2],
    /// The module's outputs that it computes.
    pub(crate) rows: Range<usize>,
    /// The module's inputs that it takes.
    pub(crate) columns: Range<usize>,
}

/// Loads the tensors that were verified, each once.
pub(crate) struct Loader<'a, B: Backend> {
    pub(crate) backend: &'a B,
    world: World,
    checkpoint: &'a Checkpoint,
    specs: &'a BTreeMap<String, TensorSpec>,
    /// Of each tensor.
    formats: &'a BTreeMap<String, WeightFormat>,
    quantized: Option<Quantization>,
    hash_all: bool,
    digest: Sha256,
    /// Projections loaded so far, by number.
    pub(crate) slots: Vec<Slot>,
    /// Bytes of prepared weights; on the first rank also of what other ranks prepare.
    pub(crate) weight_bytes: u64,
    pub(crate) conversions: Vec<Conversion>,
}

/// A mapped tensor.
pub(crate) struct Mapped<'a> {
    spec: &'a TensorSpec,
    data: Data,
    /// Bytes in the files.
    bytes: u64,
}

enum Data {
    Stored(DType, Part),
    Computed(Box<dyn RowSource>),
    /// On its way to another format.
    Converted(Measured),
}

impl Mapped<'_> {
    pub(crate) fn host(&self) -> HostTensor<'_> {
        let computed = |rows| HostTensor::computed(&self.spec.name, self.spec.matrix(), rows);
        match &self.data {
            Data::Stored(dtype, part) => HostTensor::new(&self.spec.name, *dtype, self.spec.shape.clone(), part),
            Data::Computed(rows) => computed(rows.as_ref()),
            Data::Converted(rows) => computed(rows),
        }
    }
}

impl<'a, B: Backend> Loader<'a, B> {
    /// Of tensors that are kept in these formats, which follow from `quantized`; `digest` has seen the config already.
    pub(crate) fn new(
        backend: &'a B,
        checkpoint: &'a Checkpoint,
        (specs, formats): (&'a BTreeMap<String, TensorSpec>, &'a BTreeMap<String, WeightFormat>),
        quantized: Option<Quantization>,
        digest: Sha256,
    ) -> Self {
        let hash_all = specs.values().map(|spec| checkpoint.bytes(spec)).sum::<u64>() < HASH_ALL_BELOW;
        let (slots, conversions) = (Vec::new(), Vec::new());
        let world = backend.world();
        let weight_bytes = 0;
        Self {
            backend,
            world,
            checkpoint,
            specs,
            formats,
            quantized,
            hash_all,
            digest,
            slots,
            weight_bytes,
            conversions,
        }
    }

    /// This rank's share of `{prefix}.weight`, with `{prefix}.bias` if the model has one.
    pub(crate) fn linear(&mut self, prefix: &str) -> Result<B::Linear, LoadError> {
        let (matrix, bias) = (self.matrix(prefix)?, self.bias(prefix)?);
        self.weight(matrix, bias, Purpose::Product)
    }

    /// As [`linear`](Self::linear), where rows are looked up too.
    pub(crate) fn table(&mut self, prefix: &str) -> Result<B::Linear, LoadError> {
        let (matrix, bias) = (self.matrix(prefix)?, self.bias(prefix)?);
        self.weight(matrix, bias, Purpose::Table)
    }

    /// As [`linear`](Self::linear), by the matrix's full name; there is no bias.
    pub(crate) fn named_linear(&mut self, name: &str) -> Result<B::Linear, LoadError> {
        let matrix = self.named_matrix(name)?;
        self.weight(matrix, None, Purpose::Product)
    }

    fn weight(
        &mut self,
        (weight, format): (Mapped<'a>, WeightFormat),
        bias: Option<Mapped<'a>>,
        purpose: Purpose,
    ) -> Result<B::Linear, LoadError> {
        let linear = self.prepare(&weight, bias.as_ref(), format, self.share(weight.spec), purpose)?;
        self.record(weight)?;
        Ok(linear)
    }

    /// As [`linear`](Self::linear), for a layer that adapters can change.
    pub(crate) fn projection(&mut self, prefix: &str) -> Result<Projection<B>, LoadError> {
        let weight = self.linear(prefix)?;
        let share = self.share(&self.specs[&format!("{prefix}.weight")]);
        Ok(Projection::new(weight, self.slot(prefix, share)))
    }

    /// `{prefix}.weight` and bias, cut along the rows into projections of the given heights, of which this rank has the
    /// share that each says.
    pub(crate) fn split_projection<const N: usize>(
        &mut self,
        prefix: &str,
        heights: [(usize, Split); N],
    ) -> Result<[Projection<B>; N], LoadError> {
        let (weight, format) = self.matrix(prefix)?;
        let bias = self.bias(prefix)?;
        let [_, in_features] = weight.spec.matrix();
        let mut start = 0;
        let mut parts = Vec::with_capacity(N);
        for (height, split) in heights {
            let rows = split.outputs(self.world, height);
            let share = (start + rows.start..start + rows.end, 0..in_features);
            let part = self.prepare(&weight, bias.as_ref(), format, share.clone(), Purpose::Product)?;
            parts.push(Projection::new(part, self.slot(prefix, share)));
            start += height;
        }
        self.record(weight)?;
        Ok(parts.try_into().unwrap_or_else(|_| unreachable!("one part per height")))
    }

    /// Some rows and columns of a weight on the device, with their part of the bias.
    fn prepare(
        &self,
        weight: &Mapped<'_>,
        bias: Option<&Mapped<'_>>,
        format: WeightFormat,
        (rows, columns): (Range<usize>, Range<usize>),
        purpose: Purpose,
    ) -> DeviceResult<B::Linear> {
        // A sum over ranks has the bias once.
        let bias = bias.filter(|_| columns.start == 0).map(|bias| bias.host().rows(rows.start, rows.len()));
        let part = Columns::new(weight.host().rows(rows.start, rows.len()), columns);
        self.backend.linear_weight(&HostLinear { weight: part.host(), bias, format, purpose })
    }

    /// The outputs and inputs of a matrix that this rank has.
    fn share(&self, spec: &TensorSpec) -> (Range<usize>, Range<usize>) {
        let [out_features, in_features] = spec.matrix();
        (spec.split.outputs(self.world, out_features), spec.split.inputs(self.world, in_features))
    }

    /// `{prefix}.weight`, cut along the columns into halves: for an input that is two vectors one behind the other.
    pub(crate) fn split_columns(&mut self, prefix: &str) -> Result<[B::Linear; 2], LoadError> {
        let (weight, format) = self.matrix(prefix)?;
        let [rows, cols] = weight.spec.matrix();
        let half = |columns| self.prepare(&weight, None, format, (0..rows, columns), Purpose::Product);
        let halves = [half(0..cols / 2)?, half(cols / 2..cols)?];
        self.record(weight)?;
        Ok(halves)
    }

    /// `{prefix}.weight`, cut along the rows into so many equal parts.
    pub(crate) fn split_rows(&mut self, prefix: &str, parts: usize) -> Result<Vec<B::Linear>, LoadError> {
        let (weight, format) = self.matrix(prefix)?;
        let [rows, cols] = weight.spec.matrix();
        let height = rows / parts;
        let part =
            |i: usize| self.prepare(&weight, None, format, (i * height..(i + 1) * height, 0..cols), Purpose::Product);
        let parts = (0..parts).map(part).collect::<DeviceResult<_>>()?;
        self.record(weight)?;
        Ok(parts)
    }

    /// Loads what changes no output, and so is no part of the digest.
    pub(crate) fn undigested<T>(
        &mut self,
        load: impl FnOnce(&mut Self) -> Result<T, LoadError>,
    ) -> Result<T, LoadError> {
        let digest = self.digest.clone();
        let loaded = load(self);
        self.digest = digest;
        loaded
    }

    /// The number of a new projection.
    fn slot(&mut self, prefix: &str, (rows, columns): (Range<usize>, Range<usize>)) -> usize {
        let shape = self.specs[&format!("{prefix}.weight")].matrix();
        self.slots.push(Slot { module: prefix.to_owned(), shape, rows, columns });
        self.slots.len() - 1
    }

    /// `{prefix}.weight` of a norm, with `offset` added to each element.
    pub(crate) fn norm(&mut self, prefix: &str, offset: f32) -> Result<B::Vector, LoadError> {
        let weight = self.map(&format!("{prefix}.weight"))?;
        let host = weight.host();
        self.weight_bytes += host.len() as u64 * 4;
        if offset == 0.0 {
            return Ok(self.backend.vector(&host)?);
        }
        let bytes: Vec<u8> = host.to_f32().iter().flat_map(|w| (w + offset).to_le_bytes()).collect();
        Ok(self.backend.vector(&HostTensor::new(host.name(), DType::F32, host.shape().to_vec(), &bytes))?)
    }

    /// A vector by its full name.
    pub(crate) fn vector(&mut self, name: &str) -> Result<B::Vector, LoadError> {
        let vector = self.map(name)?;
        let host = vector.host();
        self.weight_bytes += host.len() as u64 * 4;
        Ok(self.backend.vector(&host)?)
    }

    /// A vector that stays on the host, by its full name.
    pub(crate) fn host_vector(&mut self, name: &str) -> Result<Vec<f32>, LoadError> {
        Ok(self.map(name)?.host().to_f32())
    }

    /// This rank's share of `{prefix}.weight`, the up-projection of latent attention.
    pub(crate) fn latent(
        &mut self,
        prefix: &str,
        shape: impl for<'t> FnOnce(HostTensor<'t>, WeightFormat) -> HostLatent<'t>,
    ) -> Result<B::Latent, LoadError>
    where
        B: LatentOps,
    {
        let (weight, format) = self.matrix(prefix)?;
        let (rows, _) = self.share(weight.spec);
        let latent = self.backend.latent_weight(&shape(weight.host().rows(rows.start, rows.len()), format))?;
        self.record(weight)?;
        Ok(latent)
    }

    /// The digest of all that was loaded, as lower-case hex.
    pub(crate) fn digest(self) -> String {
        self.digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// `{prefix}.bias`, if the model has one.
    fn bias(&mut self, prefix: &str) -> Result<Option<Mapped<'a>>, LoadError> {
        let name = format!("{prefix}.bias");
        let bias = if self.specs.contains_key(&name) { Some(self.map(&name)?) } else { None };
        self.weight_bytes += bias.as_ref().map_or(0, |b| b.host().len() as u64 * 4);
        Ok(bias)
    }

    /// Maps `{prefix}.weight` on its way to the format in which it is kept.
    pub(crate) fn matrix(&mut self, prefix: &str) -> Result<(Mapped<'a>, WeightFormat), CheckpointError> {
        self.named_matrix(&format!("{prefix}.weight"))
    }

    fn named_matrix(&mut self, name: &str) -> Result<(Mapped<'a>, WeightFormat), CheckpointError> {
        let format = self.formats[name];
        let weight = self.map(name)?;
        Ok((self.convert(weight, format), format))
    }

    /// Whether this rank checks and hashes all tensors.
    fn sees_all(&self) -> bool {
        self.world.rank == 0
    }

    /// Maps a tensor; on the first rank hashes it and checks that it is finite.
    pub(crate) fn map(&mut self, name: &str) -> Result<Mapped<'a>, CheckpointError> {
        let (spec, sees_all) = (&self.specs[name], self.sees_all());
        if let Some(encoding) = &spec.encoding {
            let parts = self.checkpoint.parts(spec, |entry, bytes| {
                if sees_all {
                    hash(&mut self.digest, self.hash_all, &entry.name, entry.stored_type, &entry.shape, bytes);
                }
            })?;
            let bytes = parts.bytes();
            let data = match encoding.open(spec.matrix(), parts)? {
                Values::Computed(rows) => Data::Computed(rows),
                Values::Blocks(format, part) => Data::Stored(DType::Ggml(format), part),
            };
            return Ok(Mapped { spec, data, bytes });
        }
        let (entry, part) = self.checkpoint.tensor(name)?;
        let dtype = entry.dtype().expect("verified");
        let bytes = part.len() as u64;
        if sees_all {
            hash(&mut self.digest, self.hash_all, name, dtype, &spec.shape, &part);
        }
        let mapped = Mapped { spec, data: Data::Stored(dtype, part), bytes };
        if !sees_all {
            return Ok(mapped);
        }
        match precision::first_non_finite(&mapped.host()) {
            None => Ok(mapped),
            Some((element, value)) => Err(CheckpointError::NotFinite { tensor: name.to_owned(), element, value }),
        }
    }

    /// The matrix on its way to `format`, its memory counted.
    fn convert(&mut self, matrix: Mapped<'a>, format: WeightFormat) -> Mapped<'a> {
        let shape = matrix.spec.matrix();
        self.weight_bytes += kept(format, shape[0] * shape[1], matrix.bytes);
        let by_row = matrix.spec.role == Role::Linear && self.quantized == Some(Quantization::Int8);
        let measured = |rows| Data::Converted(Measured::new(rows, shape, format, by_row));
        let data = match matrix.data {
            // f32 holds every stored float, and a format itself, unless its blocks are to have one scale along a row.
            Data::Stored(dtype, part) if format == WeightFormat::F32 || (format == dtype.into() && !by_row) => {
                Data::Stored(dtype, part)
            }
            Data::Stored(dtype, part) => measured(Box::new(StoredRows { dtype, cols: shape[1], part })),
            Data::Computed(rows) => measured(rows),
            converted => converted,
        };
        Mapped { data, ..matrix }
    }

    /// Records what a conversion has cost, once the device has read the rows.
    pub(crate) fn record(&mut self, matrix: Mapped<'a>) -> Result<(), CheckpointError> {
        let Data::Converted(measured) = &matrix.data else { return Ok(()) };
        let spec = matrix.spec;
        let precision::Measurement { max_abs_error, mean_abs_error, elements } = measured.loss(&spec.name)?;
        self.conversions.push(Conversion {
            tensor: spec.name.clone(),
            from: match &spec.encoding {
                Some(encoding) => encoding.to_string(),
                None => self.checkpoint.dtype(&spec.name).to_string(),
            },
            to: measured.format(),
            max_abs_error,
            mean_abs_error,
            measured: elements,
            bytes_before: matrix.bytes,
            bytes_after: kept(measured.format(), spec.shape.iter().product(), matrix.bytes),
        });
        Ok(())
    }
}

/// Adds a tensor to the digest.
fn hash(digest: &mut Sha256, all: bool, name: &str, dtype: impl Display, shape: &[usize], bytes: &[u8]) {
    digest.update(format!("{name}\n{dtype} {shape:?}\n"));
    digest.update(if all { bytes } else { &bytes[..bytes.len().min(HASH_PREFIX)] });
}
