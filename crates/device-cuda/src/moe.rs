//! Mixture of experts: how a layer's experts lie on the device, and which of the kernels in `moe.cu` compute them.
//!
//! Invariant: what is queued for a number of rows depends on that number alone, whatever the logits are, so a step can be replayed.

use std::sync::Arc;

use baton_device::{DeviceError, GroupScore, HostExperts, HostTensor, Result, Routing, Rows, Scoring, WeightFormat};

use crate::gpu::{Arg, Gpu, Launch};
use crate::memory::Buffer;
use crate::program::{Kernel, Source};
use crate::tensor::{DataType, Tensor};
use crate::weights::{Form, Kept};

/// Experts of a layer, of which the kernels keep a few numbers for each lane.
const MOST_EXPERTS: usize = 1024;
/// Experts of a row.
const MOST_CHOSEN: usize = 32;
/// Threads of most kernels' blocks.
const THREADS: u32 = 128;
/// Columns of a block of the kernels for few rows, two for each warp; of `direct_down`; of `combine`, four for each thread.
const COLUMNS: usize = 8;
const DIRECT_COLUMNS: usize = 4;
const COMBINED: usize = 512;
/// Rows that are computed together: what lies between two products is `top_k` times theirs.
const ROWS_AT_ONCE: usize = 4096;
/// Slots of a tile of the kernels for few rows, where pairs are sorted.
const SKINNY: usize = 8;

/// The experts of a layer that are held here.
pub struct Experts {
    shape: Shape,
    /// `Routing` of the kernels.
    routing: Box<[u8]>,
    bias: Option<Buffer>,
    gate: Stack,
    up: Stack,
    down: Stack,
    kernels: Kernels,
}

/// Sizes of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    hidden: usize,
    /// Width of an expert.
    inner: usize,
    /// Experts in all.
    count: usize,
    /// Of which so many are here.
    held: usize,
    top_k: usize,
}

/// One matrix of every expert held, one behind the other.
struct Stack {
    buffer: Buffer,
    format: WeightFormat,
    kept: Kept,
    rows: usize,
    /// Bytes of a row.
    stride: usize,
}

struct Kernels {
    /// Of logits as activations are, and in f32.
    route: [Kernel; 2],
    sort: Kernel,
    direct: [Kernel; 2],
    tiled: Vec<Tiled>,
    combine: Kernel,
}

/// Kernels that multiply tiles of so many slots.
struct Tiled {
    slots: usize,
    gate_up: Kernel,
    down: Kernel,
    /// Columns of a block of each.
    columns: [usize; 2],
    /// Bytes of shared memory of each.
    shared: [usize; 2],
}

/// What layers of experts are made on.
pub(crate) struct MoeKernels {
    gpu: Arc<Gpu>,
    activations: DataType,
}

impl MoeKernels {
    pub(crate) fn new(gpu: &Arc<Gpu>, activations: DataType) -> Result<Self> {
        Ok(Self { gpu: gpu.clone(), activations })
    }

    /// Packs the experts held, one after the other, and asks for their kernels.
    ///
    /// # Errors
    /// What reading them gives, [`DeviceError::Shape`] and [`DeviceError::Format`] of their matrices, too little memory, and
    /// [`DeviceError::Unavailable`] for more experts than kernels choose from.
    pub(crate) fn experts(&self, src: HostExperts<'_>) -> Result<Experts> {
        let (gpu, activations) = (&self.gpu, self.activations);
        let HostExperts { count, held, source, formats, limit, routing } = src;
        assert!(
            limit.is_none() && routing.by_token.is_none(),
            "no compressed attention: the capabilities do not offer it"
        );
        assert!(held.end <= count && !held.is_empty(), "experts {held:?} of {count}");
        assert!(routing.top_k <= count, "{} of {count} experts for each row", routing.top_k);
        if count > MOST_EXPERTS || routing.top_k > MOST_CHOSEN {
            let reason = format!(
                "its kernels choose at most {MOST_CHOSEN} of {MOST_EXPERTS} experts for a row, not {} of {count}",
                routing.top_k
            );
            return Err(DeviceError::Unavailable { device: gpu.name().to_owned(), reason });
        }
        let mut stacks: Option<[Stack; 3]> = None;
        for (i, e) in held.clone().enumerate() {
            let matrices = source.expert(e)?;
            let stacks = match &stacks {
                Some(stacks) => stacks,
                None => stacks.insert(Stack::three(gpu, held.len(), &matrices, formats)?),
            };
            let [gate, _, down] = stacks;
            for (stack, (matrix, inputs)) in stacks.iter().zip(matrices.iter().zip([down, down, gate].map(|s| s.rows)))
            {
                matrix.expect_shape(&[stack.rows, inputs])?;
                stack.put(gpu, i, matrix)?;
            }
        }
        let [gate, up, down] = stacks.expect("an expert is held");
        let shape = Shape { hidden: down.rows, inner: gate.rows, count, held: held.len(), top_k: routing.top_k };
        let bias = match &routing.scoring {
            Scoring::Softmax => None,
            Scoring::Sigmoid { correction_bias } => {
                assert_eq!(correction_bias.len(), count, "a bias for each expert");
                Some(gpu.load(&DataType::F32.encode(correction_bias), "a router's bias")?)
            }
            Scoring::SqrtSoftplus { .. } => panic!("no compressed attention: the capabilities do not offer it"),
        };
        let kernels = Kernels::new(gpu, activations, shape, [&gate, &up, &down].map(|stack| stack.kept.form))?;
        let routing = packed(&routing, count, held.start, held.len());
        Ok(Experts { shape, routing, bias, gate, up, down, kernels })
    }

    /// Queues `out = Σ weight · expert(x)`: x, out `[rows, hidden]` of the activations' type, logits `[rows, experts]`, of that
    /// type or f32.
    pub(crate) fn fused(&self, x: &Tensor, logits: &Tensor, experts: &Experts, out: &mut Tensor) -> Result<()> {
        let (rows, activations) = (x.rows(), self.activations);
        let Shape { hidden, count, .. } = experts.shape;
        assert_eq!((x.cols(), out.cols(), logits.cols()), (hidden, hidden, count), "widths of experts");
        assert_eq!((logits.rows(), x.dtype()), (rows, activations), "rows and type of experts' input");
        let out = out.output(rows, activations);
        for start in (0..rows).step_by(ROWS_AT_ONCE) {
            let at = |address: u64, cols: usize, dtype: DataType| address + (start * cols * dtype.bytes()) as u64;
            let x = at(x.address(), hidden, activations);
            let own_logits = at(logits.address(), count, logits.dtype());
            let out = at(out, hidden, activations);
            self.some(ROWS_AT_ONCE.min(rows - start), x, (own_logits, logits.dtype()), experts, out)?;
        }
        Ok(())
    }

    /// As [`MoeKernels::fused`], of rows at these addresses.
    fn some(&self, rows: usize, x: u64, logits: (u64, DataType), experts: &Experts, out: u64) -> Result<()> {
        let Self { gpu, activations } = self;
        let Experts { shape, kernels, .. } = experts;
        let Shape { hidden, inner, count, held, top_k } = *shape;
        let pairs = rows * top_k;
        let tiled = tiles(*shape, rows, |tiled: &Tiled| tiled.slots, &kernels.tiled);
        let bound = tiled.map_or(pairs, |tiled| pairs.min(pairs / tiled.slots + held));

        let scratch = |numbers: usize, bytes: usize| gpu.scratch(numbers * bytes);
        let (ids, weights, tiles) = (scratch(pairs, 4)?, scratch(pairs, 4)?, scratch(bound, 12)?);
        let h = scratch(pairs * inner, activations.bytes())?;
        let [gate, up, down] = [&experts.gate, &experts.up, &experts.down].map(Stack::argument);
        let sizes = |sizes: &[usize]| sizes.iter().map(|n| Arg::I32(*n as i32)).collect::<Vec<_>>();
        let launch = |kernel: &Kernel, grid: [usize; 2], threads: u32, shared: usize, args: &[&[Arg]]| {
            let grid = [grid[0] as u32, grid[1] as u32, 1];
            gpu.launch(kernel, Launch { grid, block: [threads, 1, 1], shared: shared as u32 }, &args.concat())
        };
        let pointer = |buffer: &Buffer| Arg::Ptr(buffer.address());
        let null = Arg::Ptr(0);

        let own_tiles = if tiled.is_none() { pointer(&tiles) } else { null.clone() };
        let [narrow, wide] = &kernels.route;
        let route = if logits.1 == DataType::F32 { wide } else { narrow };
        let bias = experts.bias.as_ref().map_or(0, Buffer::address);
        launch(
            route,
            [rows.div_ceil(4), 1],
            THREADS,
            4 * 2 * count * 4,
            &[
                &[Arg::Ptr(logits.0), Arg::Ptr(bias), Arg::Bytes(experts.routing.clone()), Arg::I32(rows as i32)],
                &[pointer(&ids), pointer(&weights), own_tiles],
            ],
        )?;
        let x = Arg::Ptr(x);
        match tiled {
            None => {
                let [gate_up, direct_down] = &kernels.direct;
                launch(
                    gate_up,
                    [bound, inner.div_ceil(COLUMNS)],
                    THREADS,
                    0,
                    &[&[x, gate, up, null, pointer(&tiles)], &sizes(&[top_k, hidden, inner]), &[pointer(&h)]],
                )?;
                launch(
                    direct_down,
                    [hidden.div_ceil(DIRECT_COLUMNS), rows],
                    32 * top_k.min(8) as u32,
                    0,
                    &[
                        &[pointer(&h), down, pointer(&ids), pointer(&weights)],
                        &sizes(&[top_k, inner, hidden]),
                        &[Arg::Ptr(out)],
                    ],
                )
            }
            Some(Tiled { slots, gate_up, down: tiled_down, columns, shared }) => {
                let order = scratch(pairs, 4)?;
                let y = scratch(pairs * hidden, activations.bytes())?;
                launch(
                    &kernels.sort,
                    [1, 1],
                    1024,
                    0,
                    &[&[pointer(&ids)], &sizes(&[pairs, held, *slots, bound]), &[pointer(&order), pointer(&tiles)]],
                )?;
                launch(
                    gate_up,
                    [bound, inner.div_ceil(columns[0])],
                    THREADS,
                    shared[0],
                    &[
                        &[x, gate, up, pointer(&order), pointer(&tiles)],
                        &sizes(&[top_k, hidden, inner]),
                        &[pointer(&h)],
                    ],
                )?;
                launch(
                    tiled_down,
                    [bound, hidden.div_ceil(columns[1])],
                    THREADS,
                    shared[1],
                    &[&[pointer(&h), down, pointer(&order), pointer(&tiles)], &sizes(&[inner, hidden]), &[pointer(&y)]],
                )?;
                let grid = [hidden.div_ceil(COMBINED), rows];
                launch(
                    &kernels.combine,
                    grid,
                    THREADS,
                    0,
                    &[&[pointer(&y), pointer(&ids), pointer(&weights)], &sizes(&[top_k, hidden]), &[Arg::Ptr(out)]],
                )
            }
        }
    }
}

impl Stack {
    /// Room for gates, ups and downs of `experts` experts with matrices as these are.
    fn three(
        gpu: &Arc<Gpu>,
        experts: usize,
        matrices: &[HostTensor<'_>; 3],
        formats: [WeightFormat; 3],
    ) -> Result<[Self; 3]> {
        let new = |i: usize| -> Result<Self> {
            let (matrix, format) = (&matrices[i], formats[i]);
            let kept = Kept::of(matrix, format)?;
            let (rows, stride) = (matrix.shape()[0], kept.row_bytes());
            Ok(Self { buffer: gpu.alloc(experts * rows * stride, "experts")?, format, kept, rows, stride })
        };
        Ok([new(0)?, new(1)?, new(2)?])
    }

    /// Writes an expert's matrix, which must lie as the first one's and have its columns in their order.
    fn put(&self, gpu: &Gpu, expert: usize, matrix: &HostTensor<'_>) -> Result<()> {
        let own = Kept::of(matrix, self.format)?;
        if own.order.is_some() || own != self.kept {
            return Err(DeviceError::Format {
                tensor: matrix.name().to_owned(),
                dtype: matrix.dtype(),
                format: self.format,
                reason: "codes of experts must all have columns in the order of their groups, and one type of scales; as floats they \
                         can be kept"
                    .into(),
            });
        }
        own.write(gpu, &self.buffer, expert * self.rows * self.stride, matrix)
    }

    /// `Stack` of the kernels.
    fn argument(&self) -> Arg {
        let words = [self.buffer.address(), (self.rows * self.stride) as u64, self.stride as u64];
        Arg::Bytes(words.iter().flat_map(|word| word.to_ne_bytes()).collect())
    }
}

/// `Routing` of the kernels.
fn packed(routing: &Routing, count: usize, first: usize, held: usize) -> Box<[u8]> {
    let Routing { top_k, scoring, groups, norm_topk_prob, scaling_factor, by_token: _ } = routing;
    let (groups, kept, two_best) =
        groups.map_or((0, 0, false), |groups| (groups.count, groups.kept, groups.score == GroupScore::TwoBest));
    let sigmoid = matches!(scoring, Scoring::Sigmoid { .. });
    let number = |n: usize| n as u32;
    let words = [
        number(count),
        number(*top_k),
        u32::from(sigmoid),
        number(groups),
        number(kept),
        u32::from(two_best),
        u32::from(*norm_topk_prob),
        scaling_factor.to_bits(),
        number(first),
        number(held),
    ];
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Whether weights go to the tensor cores as they are: `Shape::COPIED` of the kernels.
fn is_copied(activations: DataType, form: Form) -> bool {
    form.float() == Some(activations)
}

/// `Shape` of the kernels.
struct Staged {
    /// Of all matrices together.
    columns: usize,
    /// Shared memory of all stages.
    bytes: usize,
}

impl Staged {
    fn new(activations: DataType, form: Form, slots: usize) -> Self {
        match (is_copied(activations, form), slots) {
            (true, 16) => Self { columns: 64, bytes: 4 * (slots + 64) * 128 },
            (true, _) => Self { columns: 128, bytes: 3 * (slots + 128) * 128 },
            (false, _) => Self { columns: 64, bytes: 4 * slots * 256 },
        }
    }
}

impl Kernels {
    fn new(gpu: &Gpu, activations: DataType, shape: Shape, forms: [Form; 3]) -> Result<Self> {
        let t = activations.name();
        let [gate, up, down] = forms.map(Form::type_name);
        let kernel = |name: String| gpu.kernel(Source::Moe, name);
        let lanes = shape.count.div_ceil(32);
        let route = |logits: &str| kernel(format!("route<{logits}, {lanes}>"));
        // Rows that begin at multiples of 16 bytes are read so.
        let aligned = shape.hidden.is_multiple_of(8) && shape.inner.is_multiple_of(8);
        let vector = if aligned { 8 } else { 1 };
        let few = |slots: usize| kernel(format!("skinny_gate_up<{t}, {gate}, {up}, {vector}, {slots}>"));
        let tensor_cores = aligned
            && activations != DataType::F32
            && forms[0] == forms[1]
            && !forms.contains(&Form::Floats(DataType::F32));
        let tiled = if tensor_cores {
            let tiled = |slots: usize| {
                let [into, out_of] =
                    [Staged::new(activations, forms[0], slots), Staged::new(activations, forms[2], slots)];
                let kernel = |name: String| gpu.kernel(Source::MoeGrouped, name);
                Ok(Tiled {
                    slots,
                    gate_up: kernel(format!("grouped_gate_up<{t}, {gate}, {slots}>"))?,
                    down: kernel(format!("grouped_down<{t}, {down}, {slots}>"))?,
                    columns: [into.columns / 2, out_of.columns],
                    shared: [into.bytes, out_of.bytes],
                })
            };
            // What is taken apart in registers leaves none for the sums of larger tiles.
            let copied = forms.iter().all(|form| is_copied(activations, *form));
            let slots: &[usize] = if copied { &[16, 64, 128] } else { &[16, 64] };
            slots.iter().map(|slots| tiled(*slots)).collect::<Result<_>>()?
        } else {
            vec![Tiled {
                slots: SKINNY,
                gate_up: few(SKINNY)?,
                down: kernel(format!("skinny_down<{t}, {down}, {vector}, {SKINNY}>"))?,
                columns: [COLUMNS; 2],
                shared: [0; 2],
            }]
        };
        Ok(Self {
            route: [route(t)?, route(DataType::F32.name())?],
            sort: kernel("sort_pairs".into())?,
            direct: [few(1)?, kernel(format!("direct_down<{t}, {down}, {vector}>"))?],
            tiled,
            combine: kernel(format!("combine<{t}, {vector}>"))?,
        })
    }
}

/// The tiles in which a number of rows is computed: the smallest that most experts fill once. `None` where few pairs share an
/// expert, and each is computed by itself. All of these bounds are reasoned, not measured.
fn tiles<T>(shape: Shape, rows: usize, slots: impl Fn(&T) -> usize, sizes: &[T]) -> Option<&T> {
    let pairs = rows * shape.top_k;
    if rows == 1 || pairs * 4 <= shape.count {
        return None;
    }
    sizes.iter().find(|size| pairs * 4 <= shape.count * slots(size) * 3).or(sizes.last())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_rows_take_larger_tiles_and_a_single_one_takes_none() {
        for (count, top_k) in [(8, 2), (64, 6), (128, 8), (256, 8), (384, 8)] {
            let shape = Shape { hidden: 1, inner: 1, count, held: count, top_k };
            let sizes: Vec<_> =
                (1..4096).map(|rows| tiles(shape, rows, |size| *size, &[16, 64, 128]).copied()).collect();
            assert_eq!((sizes[0], sizes[4094]), (None, Some(128)), "{top_k} of {count}");
            assert!(sizes.is_sorted(), "{top_k} of {count}");
            assert!(sizes.contains(&Some(16)) && sizes.contains(&Some(64)), "{top_k} of {count}");
        }
    }
}
