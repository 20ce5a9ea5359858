//! Linear weights and products with them.
//!
//! A product is in the type M that [`math`] says, with f32 sums; where one way ends and the next begins is reasoned, not measured:
//! - Few rows are bound by reading the weight. `product` reads it once for up to 64 rows, as it lies (floats of many features: up
//!   to 16); `product_f32` does where M is f32.
//! - Many rows are cuBLASLt's. A weight that does not lie as M is widened first, a part at a time that stays in the second
//!   cache: against the product of many rows that costs little.
//!
//! What a weight in f32 gives is f32 and unrounded, since router logits depend on it; everything else gives the type of
//! activations.

use std::collections::BTreeSet;
use std::sync::Arc;

use baton_device::{Activation, BlockFormat, Code, DeviceError, HostLinear, Purpose, Result, Rows, WeightFormat};

use crate::blas::Matmul;
use crate::choose::Ids;
use crate::gpu::{Arg, Gpu, Launch};
use crate::memory::Buffer;
use crate::order::{Order, Orders};
use crate::program::{Kernel, Source};
use crate::rows;
use crate::staging::Slot;
use crate::tensor::{DataType, Tensor};
use crate::weights::{Form, Kept};

/// Weights of one launch.
const GROUP: usize = 4;
/// Bytes of a weight that is widened for cuBLASLt, at a time.
const WIDENED: usize = 32 << 20;
/// The most rows for which a float weight that lies as cuBLASLt wants it is not cuBLASLt's.
const FEW: usize = 16;
/// The same of f32, where tensor cores do not help.
const FEW_F32: usize = 8;
/// The same of weights that would be widened first, and of narrow ones.
const SOME: usize = 64;
/// The most features of a narrow weight. cuBLASLt's tiles of 64 by 64 leave most of a large chip idle on it, or it joins parts
/// of k as we do; but ours are one launch for all that share an input (queries, keys and values of small models), biases too.
const NARROW: usize = 2048;

/// A linear weight with its bias.
pub struct Linear {
    form: Form,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    /// Columns on the device.
    columns: usize,
    /// Which of its input's they are, if not in their order.
    order: Option<Arc<Order>>,
    /// As [`crate::weights`] says.
    weight: Buffer,
    /// In f32.
    bias: Option<Buffer>,
    kernels: Kernels,
}

impl Linear {
    /// What weights have in common that take the same rows in one launch.
    fn kind(&self) -> (Form, usize, Option<usize>) {
        (self.form, self.columns, self.order.as_ref().map(|order| order.number))
    }
}

/// What is done with a weight of a form.
struct Kernels {
    /// Smallest tiles first.
    products: Vec<Product>,
    /// Of a gate and what it lets through, in type M.
    gated: Option<Product>,
    /// Rows in the type of an embedding.
    embed: Kernel,
    /// Rows in M.
    widen: Kernel,
    /// What is left to do to cuBLASLt's result.
    add_bias: Kernel,
    /// What is left to do to a product of parts of k.
    add_parts: Kernel,
    /// M.
    math: DataType,
    /// Type of cuBLASLt's results: that of `out` if it gives it.
    sums: DataType,
    /// Type of results.
    out: DataType,
}

/// A product in one launch.
struct Product {
    /// Type of the rows that it takes.
    input: DataType,
    /// Rows and features of a block.
    tile: [usize; 2],
    /// Warps of a block.
    warps: Warps,
    kernel: Kernel,
}

/// How the warps of a block share its work.
#[derive(Clone, Copy)]
enum Warps {
    /// Up to so many take columns of k each.
    Columns(usize),
    /// So many have features of their own, and k can be cut into parts.
    Features(usize),
}

/// The most rows whose product with a weight of so many features is our own kernels'.
fn few(form: Form, math: DataType, out_features: usize) -> usize {
    match (form.float() == Some(math), math) {
        (true, DataType::F32) => FEW_F32,
        (true, _) if out_features > NARROW => FEW,
        _ => SOME,
    }
}

/// Formats in which weights, also those of experts, can be kept.
pub(crate) fn weight_formats() -> BTreeSet<WeightFormat> {
    use WeightFormat::{BF16, Coded, F16, F32, Ggml};
    [F32, F16, BF16].into_iter().chain(BlockFormat::ALL.map(Ggml)).chain(Code::ALL.map(Coded)).collect()
}

/// Formats whose weights meet activations of a type that were rounded to it; the others give f32.
pub(crate) fn narrow(activations: DataType) -> BTreeSet<WeightFormat> {
    let narrow = |format: &WeightFormat| activations != DataType::F32 && *format != WeightFormat::F32;
    weight_formats().into_iter().filter(narrow).collect()
}

/// The type in which a weight meets activations: its own if it is that of the activations, or f32 if one of them is; blocks and codes
/// meet activations as they are. f16 and bf16 meet in bf16, which overflows for neither.
fn math(form: Form, activations: DataType) -> DataType {
    match form.float() {
        None => activations,
        Some(own) if own == activations => own,
        Some(own) if own == DataType::F32 || activations == DataType::F32 => DataType::F32,
        Some(_) => DataType::BF16,
    }
}

/// The kernels of linear and blocks, for activations of a type.
pub(crate) struct LinearKernels {
    gpu: Arc<Gpu>,
    activations: DataType,
    ids: Slot,
    orders: Orders,
}

impl LinearKernels {
    pub(crate) fn new(gpu: &Arc<Gpu>, activations: DataType) -> Result<Self> {
        Ok(Self { gpu: gpu.clone(), activations, ids: gpu.slot(4096, "tokens")?, orders: Orders::default() })
    }

    /// Load time: checks shape and format, packs, uploads, asks for the kernels that the format needs.
    pub(crate) fn weight(&self, src: &HostLinear<'_>) -> Result<Linear> {
        let &[out_features, in_features] = src.weight.shape() else {
            panic!("{}: a linear weight has two dimensions, not {:?}", src.weight.name(), src.weight.shape())
        };
        let bias = src.bias.as_ref().map(|bias| {
            bias.expect_shape(&[out_features])?;
            self.gpu.load(&DataType::F32.encode(&bias.to_f32()), "a bias")
        });
        let kept = Kept::of(&src.weight, src.format)?;
        if kept.order.is_some() && src.purpose == Purpose::Table {
            return Err(DeviceError::Format {
                tensor: src.weight.name().to_owned(),
                dtype: src.weight.dtype(),
                format: src.format,
                reason: "rows are looked up in it, and its columns lie in another order; as floats it can be kept"
                    .into(),
            });
        }
        let weight = kept.load(&self.gpu, &src.weight)?;
        let Kept { form, columns, order } = kept;
        Ok(Linear {
            form,
            out_features,
            in_features,
            columns,
            order: order.map(|columns| self.orders.get(&self.gpu, columns)).transpose()?,
            weight,
            bias: bias.transpose()?,
            kernels: self.kernels(form, out_features, src.purpose)?,
        })
    }

    fn kernels(&self, form: Form, out_features: usize, purpose: Purpose) -> Result<Kernels> {
        use Warps::{Columns, Features};
        let kernel = |name: String| self.gpu.kernel(Source::Linear, name);
        let math = math(form, self.activations);
        let out = if math == DataType::F32 { DataType::F32 } else { self.activations };
        let sums = if out == math { math } else { DataType::F32 };
        let (f, m, s, y) = (form.type_name(), math.name(), sums.name(), out.name());
        let tiled = |(tiles, panels, warps): (usize, usize, Warps)| {
            let kernel = kernel(format!("product<{f}, {m}, {y}, {tiles}, {panels}>"))?;
            let apart = if let Features(warps) = warps { warps } else { 1 };
            Ok(Product { input: math, tile: [8 * tiles, 16 * panels * apart], warps, kernel })
        };
        let exact = |input: DataType| {
            let kernel = kernel(format!("product_f32<{f}, {}>", input.name()))?;
            Ok(Product { input, tile: [FEW_F32, 1], warps: Columns(4), kernel })
        };
        let gated = || {
            let kernel = kernel(format!("product<{f}, {m}, {y}, 1, 2, true>"))?;
            Ok(Product { input: math, tile: [8, 16], warps: Columns(8), kernel })
        };
        let products = match math {
            DataType::F32 if self.activations == DataType::F32 => vec![exact(DataType::F32)?],
            DataType::F32 => vec![exact(self.activations)?, exact(DataType::F32)?],
            _ => {
                let tiles = [(1, 1, Columns(8)), (2, 1, Columns(8)), (4, 2, Features(4)), (8, 2, Features(4))];
                let few = tiles.into_iter().filter(|(tiles, ..)| 8 * tiles <= few(form, math, out_features));
                few.map(tiled).collect::<Result<_>>()?
            }
        };
        Ok(Kernels {
            products,
            gated: (math != DataType::F32 && purpose == Purpose::Product).then(gated).transpose()?,
            embed: kernel(format!("unpack<{f}, {y}>"))?,
            widen: kernel(format!("unpack<{f}, {m}>"))?,
            add_bias: kernel(format!("add_bias<{s}, {y}>"))?,
            add_parts: kernel(format!("add_parts<{y}>"))?,
            math,
            sums,
            out,
        })
    }

    /// `out[t] = row ids[t]`, where chosen tokens are at `chosen`.
    pub(crate) fn embed(&self, ids: &Ids, chosen: u64, table: &Linear, out: &mut Tensor) -> Result<()> {
        assert_eq!(out.cols(), table.in_features, "width of an embedding");
        assert!(ids.limit <= table.out_features, "tokens up to {} of {}", ids.limit, table.out_features);
        let to = out.output(ids.words.len(), table.kernels.out);
        let bytes: Vec<u8> = ids.words.iter().flat_map(|id| id.to_ne_bytes()).collect();
        let address = self.gpu.upload(&self.ids, &bytes)?;
        self.unpack(table, &table.kernels.embed, [address, chosen], 0, [ids.words.len(), table.in_features], to)
    }

    /// Rows of a weight, so many of so many columns: those at `ids`, or those from `first` on.
    fn unpack(
        &self,
        weight: &Linear,
        kernel: &Kernel,
        [ids, chosen]: [u64; 2],
        first: usize,
        [rows, k]: [usize; 2],
        out: u64,
    ) -> Result<()> {
        let lanes = k.div_ceil(128) * 4;
        let threads = lanes.next_multiple_of(32).min(128);
        let grid = [rows as u32, lanes.div_ceil(threads) as u32, 1];
        let launch = Launch { grid, block: [threads as u32, 1, 1], shared: 0 };
        let args = [
            Arg::Ptr(weight.weight.address()),
            Arg::Ptr(ids),
            Arg::Ptr(chosen),
            Arg::I32(first as i32),
            Arg::I32(k as i32),
            Arg::Ptr(out),
        ];
        self.gpu.launch(kernel, launch, &args)
    }

    /// Every weight of the group with one input. Those of a format, of the narrow and of the others, share the input in their
    /// type, and launches where their sums are taken in the same order, which does not depend on the others: each has the bits
    /// that it has alone.
    pub(crate) fn group(&self, x: &Tensor, group: &mut [(&Linear, &mut Tensor)]) -> Result<()> {
        let rows = x.rows();
        let mut parts = Vec::with_capacity(group.len());
        for (weight, out) in group {
            assert_eq!((x.cols(), out.cols()), (weight.in_features, weight.out_features), "widths of a product");
            parts.push((*weight, out.output(rows, weight.kernels.out)));
        }
        if rows == 0 {
            return Ok(());
        }
        let is_direct = |weight: &Linear| rows <= few(weight.form, weight.kernels.math, weight.out_features);
        parts.sort_by_key(|(weight, _)| (weight.kind(), weight.out_features));
        for parts in parts.chunk_by(|(a, _), (b, _)| a.kind() == b.kind() && is_direct(a) == is_direct(b)) {
            let weight = parts[0].0;
            let Kernels { products, math, .. } = &weight.kernels;
            let direct = is_direct(weight);
            let taken = x.dtype() == *math || direct && products.iter().any(|product| product.input == x.dtype());
            let (input, dtype, _converted) = self.input(x, if taken { x.dtype() } else { *math }, weight)?;
            if direct {
                let fitting = || products.iter().filter(|product| product.input == dtype);
                let product = fitting().find(|product| rows <= product.tile[0]).or(fitting().next_back());
                let product = product.expect("a product of M");
                let shared = |weight: &Linear| self.shared(product, rows, weight);
                parts
                    .chunk_by(|(a, _), (b, _)| shared(a) == shared(b))
                    .flat_map(|parts| parts.chunks(GROUP))
                    .try_for_each(|parts| self.product(product, input, rows, parts))?;
            } else {
                parts.iter().try_for_each(|(weight, out)| self.many_rows(input, rows, weight, *out))?;
            }
        }
        Ok(())
    }

    /// `out = activation(gate · x) ⊙ (up · x)` in one launch, where there is a kernel for it: of few rows, and weights of a kind.
    /// Whether there was.
    pub(crate) fn gated(
        &self,
        activation: Activation,
        x: &Tensor,
        [gate, up]: [&Linear; 2],
        out: &mut Tensor,
    ) -> Result<bool> {
        let rows = x.rows();
        let alike = (gate.kind(), gate.in_features, gate.out_features) == (up.kind(), up.in_features, up.out_features);
        let Some(product) = gate.kernels.gated.as_ref().filter(|product| alike && rows <= product.tile[0]) else {
            return Ok(false);
        };
        assert_eq!((x.cols(), out.cols()), (gate.in_features, gate.out_features), "widths of a gated product");
        let to = out.output(rows, gate.kernels.out);
        if rows > 0 {
            let (input, _, _converted) = self.input(x, gate.kernels.math, gate)?;
            let group =
                [gate, up].map(|weight| Entry { activation: rows::number(activation), ..Entry::new(weight, to) });
            let (warps, _) = self.shared(product, rows, gate);
            let grid = [gate.out_features.div_ceil(product.tile[1]) as u32, 1, 1];
            let launch = Launch { grid, block: [32 * warps as u32, 1, 1], shared: 0 };
            self.gpu.launch(&product.kernel, launch, &product_args(&group, input, rows, gate))?;
        }
        Ok(true)
    }

    /// Where the rows of `x` are in a type, with the columns of a weight, and what keeps them there.
    fn input(&self, x: &Tensor, dtype: DataType, weight: &Linear) -> Result<(u64, DataType, Option<Buffer>)> {
        if x.dtype() == dtype && x.cols() == weight.columns && weight.order.is_none() {
            return Ok((x.address(), dtype, None));
        }
        let converted = self.convert(x, dtype, weight)?;
        Ok((converted.address(), dtype, Some(converted)))
    }

    /// `x` in another type, its rows padded and their columns in the order in which the weight has them.
    fn convert(&self, x: &Tensor, to: DataType, weight: &Linear) -> Result<Buffer> {
        let columns = weight.columns;
        let count = x.rows() * columns;
        let converted = self.gpu.scratch(count * to.bytes())?;
        if columns == x.cols() && weight.order.is_none() {
            rows::convert(&self.gpu, x, (converted.address(), to))?;
            return Ok(converted);
        }
        let kernel = self.gpu.kernel(Source::Linear, format!("pad_rows<{}, {}>", x.dtype().name(), to.name()))?;
        let order = weight.order.as_ref().map_or(0, |order| order.address());
        let addresses = [x.address(), order, converted.address()].map(Arg::Ptr);
        let shape = [Arg::I64(count as i64), Arg::I32(x.cols() as i32), Arg::I32(columns as i32)];
        self.gpu.launch(&kernel, one_each(count), &[&addresses[..], &shape].concat())?;
        Ok(converted)
    }

    /// Warps that share a block's columns or features, and parts into which columns are cut.
    fn shared(&self, product: &Product, rows: usize, weight: &Linear) -> (usize, usize) {
        let [tile_rows, features] = product.tile;
        let (panels, spans) = (weight.out_features.div_ceil(features), weight.columns.div_ceil(128));
        match product.warps {
            // A power of two, as sums are added up in halves. Where blocks are many, the shorter end of each is worth more
            // than the shorter way to it.
            Warps::Columns(most) => (spans.next_power_of_two().min(if panels >= 2048 { most / 2 } else { most }), 1),
            // Two blocks for each multiprocessor, and two spans for each block at least.
            Warps::Features(warps) => {
                let blocks = panels * rows.div_ceil(tile_rows);
                (warps, (2 * self.gpu.multiprocessors() / blocks).min(spans / 2).max(1))
            }
        }
    }

    /// The product with up to [`GROUP`] weights of one format, [`LinearKernels::shared`] alike, in one launch, or two where
    /// parts of k are added up.
    fn product(&self, product: &Product, x: u64, rows: usize, parts: &[(&Linear, u64)]) -> Result<()> {
        let (warps, cuts) = self.shared(product, rows, parts[0].0);
        let [tile_rows, features] = product.tile;
        let panels: usize = parts.iter().map(|(weight, _)| weight.out_features.div_ceil(features)).sum();
        let tiles = rows.div_ceil(tile_rows);
        let grid = [panels as u32, tiles as u32, cuts as u32];
        let launch = Launch { grid, block: [32 * warps as u32, 1, 1], shared: 0 };
        let args = |group: &[Entry]| product_args(group, x, rows, parts[0].0);
        let mut group: Vec<Entry> = parts.iter().map(|(weight, out)| Entry::new(weight, *out)).collect();
        if cuts == 1 {
            return self.gpu.launch(&product.kernel, launch, &args(&group));
        }
        let features = group.iter().map(|entry| entry.out_features as usize);
        let (all, most) = (features.clone().sum::<usize>(), features.max().unwrap_or(0));
        let sums = self.gpu.scratch(cuts * rows * all * DataType::F32.bytes())?;
        let (mut into, mut next) = (group.clone(), sums.address());
        for (into, from) in into.iter_mut().zip(&mut group) {
            (into.out, from.rows) = (next, next);
            next += (cuts * rows * DataType::F32.bytes()) as u64 * u64::from(from.out_features);
        }
        self.gpu.launch(&product.kernel, launch, &args(&into))?;
        let grid = [(rows * most).div_ceil(256) as u32, parts.len() as u32, 1];
        let args = [group_arg(&group), Arg::I32(cuts as i32), Arg::I32(rows as i32)];
        self.gpu.launch(&parts[0].0.kernels.add_parts, Launch { grid, block: [256, 1, 1], shared: 0 }, &args)
    }

    /// The product by cuBLASLt.
    fn many_rows(&self, x: u64, rows: usize, weight: &Linear, out: u64) -> Result<()> {
        let (form, n, k) = (weight.form, weight.out_features, weight.columns);
        let Kernels { math, sums, out: output, ref widen, ref add_bias, .. } = weight.kernels;
        let wide = if sums == output { None } else { Some(self.gpu.scratch(rows * n * sums.bytes())?) };
        let to = wide.as_ref().map_or(out, Buffer::address);
        let product = Matmul { rows, n, k, input: math, output: sums, out_stride: n, x, weight: 0, out: to };
        if form.float() == Some(math) {
            self.gpu.matmul(&Matmul { weight: weight.weight.address(), ..product })?;
        } else {
            let part = (WIDENED / (k * math.bytes())).next_multiple_of(128).min(n);
            let widened = self.gpu.scratch(part * k * math.bytes())?;
            for first in (0..n).step_by(part) {
                let rows = part.min(n - first);
                self.unpack(weight, widen, [0, 0], first, [rows, k], widened.address())?;
                let out = to + (first * sums.bytes()) as u64;
                self.gpu.matmul(&Matmul { n: rows, weight: widened.address(), out, ..product })?;
            }
        }
        if weight.bias.is_none() && sums == output {
            return Ok(());
        }
        let bias = weight.bias.as_ref().map_or(0, Buffer::address);
        let count = rows * n;
        let args = [Arg::Ptr(to), Arg::Ptr(bias), Arg::Ptr(out), Arg::I64(count as i64), Arg::I32(n as i32)];
        self.gpu.launch(add_bias, one_each(count), &args)
    }
}

/// A thread for each of so many elements.
fn one_each(count: usize) -> Launch {
    Launch { grid: [count.div_ceil(256) as u32, 1, 1], block: [256, 1, 1], shared: 0 }
}

/// `Weight` of `kernels/linear.cu`.
#[derive(Clone)]
struct Entry {
    /// What is read.
    rows: u64,
    bias: u64,
    out: u64,
    out_features: u32,
    /// Of a gate.
    activation: u32,
}

impl Entry {
    fn new(weight: &Linear, out: u64) -> Self {
        let bias = weight.bias.as_ref().map_or(0, Buffer::address);
        Self { rows: weight.weight.address(), bias, out, out_features: weight.out_features as u32, activation: 0 }
    }
}

/// Arguments of `product` and `product_f32`: weights as `weight` is, and rows of `x`.
fn product_args(group: &[Entry], x: u64, rows: usize, weight: &Linear) -> [Arg; 4] {
    [group_arg(group), Arg::Ptr(x), Arg::I32(rows as i32), Arg::I32(weight.columns as i32)]
}

/// `Group` of `kernels/linear.cu`.
fn group_arg(entries: &[Entry]) -> Arg {
    let mut bytes = Vec::with_capacity(GROUP * size_of::<Entry>());
    for Entry { rows, bias, out, out_features, activation } in entries {
        bytes.extend([rows, bias, out].map(|word| word.to_ne_bytes()).concat());
        bytes.extend([out_features, activation].map(|word| word.to_ne_bytes()).concat());
    }
    bytes.resize(GROUP * size_of::<Entry>(), 0);
    Arg::Bytes(bytes.into())
}
