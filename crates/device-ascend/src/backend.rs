//! The device traits: checks shapes, and queues each operation for the owner thread.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_device::{
    Activation, AttentionBatch, AttentionParams, Backend, Caps, DType, DeviceError, DeviceMemory, Draw, Drawer,
    HostLinear, HostRope, HostTensor, KvBlocks, KvDtype, KvSpec, Op, Result, RopeLayout, Rows, TokenIds, WeightFormat,
    World,
};

use crate::cache::KvCache;
use crate::chip::Chip;
use crate::device::{Device, DeviceOptions, encode};
use crate::error::AscendError;
use crate::forms::{self, CacheShape, Forms, NormShape};
use crate::graphs::{self, MOST_ROWS};
use crate::installation::{self, Installation};
use crate::libraries::Search;
use crate::linear::{self, Linear, linear_group};
use crate::memory::MemoryUse;
use crate::object::{DataType, View};
use crate::ops::fused_rows::add_rms_norm;
use crate::ops::{attention, fused_attention, index, rope, rows};
use crate::owner::Owner;
use crate::plan::{AttentionPlan, Part, Step, mask_rows};
use crate::quant;
use crate::ranks::{self, Place};
use crate::tensor::{Buffer, Tensor, Vector};

/// How a device is opened.
#[derive(Debug, Clone)]
pub struct AscendOptions {
    /// Number among the devices that the runtime sees.
    pub device: u32,
    /// Where the libraries are.
    pub search: Search,
    /// Element type of activations; that of the checkpoint is natural. f32 computes everything in f32, for comparisons.
    pub activations: DType,
    /// The longest wait for the device.
    pub timeout: Duration,
    /// Wait behind every operator, so that an error names its cause.
    pub blocking: bool,
    /// Take fused operators, and weights in FRACTAL_NZ, where chip and shape allow; without them everything is composed of simple
    /// operators on weights as they are, for comparisons.
    pub fused: bool,
}

/// An Ascend device.
pub struct AscendBackend {
    pub(crate) caps: Caps,
    pub(crate) chip: Chip,
    pub(crate) activations: DataType,
    pub(crate) forms: Forms,
    pub(crate) owner: Arc<Owner>,
    place: Place,
    /// [`mask_rows`], `[2 * (BLOCK + 1), BLOCK]` in f32.
    masks: Buffer,
    /// Windows that attention was asked for, so that plans foresee them.
    windows: Mutex<BTreeSet<usize>>,
    /// Draws what the device does not choose itself.
    drawer: Mutex<Drawer>,
}

/// How a step ended.
pub enum Chosen {
    /// With these tokens, which the host has.
    Told(Vec<Option<u32>>),
    /// With none, and it may still be computed.
    UnderWay,
}

impl AsRef<[Option<u32>]> for Chosen {
    fn as_ref(&self) -> &[Option<u32>] {
        match self {
            Self::Told(tokens) => tokens,
            Self::UnderWay => &[],
        }
    }
}

/// Tokens of a cache block: what fused attention takes everywhere.
pub(crate) const BLOCK: usize = 128;

impl AscendBackend {
    /// Opens a device.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] with what is missing: libraries, driver, device, or a chip that is known.
    pub fn new(options: &AscendOptions) -> Result<Self> {
        let name = format!("ascend:{}", options.device);
        let unavailable = |reason: String| DeviceError::Unavailable { device: name.clone(), reason };
        let Installation { acl, soc, chip } = installation::find(&options.search, options.device)
            .map_err(|unusable| unavailable(unusable.to_string()))?;
        let activations = match options.activations {
            DType::BF16 if !chip.has_bf16() => {
                return Err(unavailable(format!("{chip} has no bf16 in any operator: ask for float16")));
            }
            DType::BF16 => DataType::BF16,
            DType::F16 => DataType::F16,
            DType::F32 => DataType::F32,
            DType::Ggml(format) => return Err(unavailable(format!("activations are floats, not {format}"))),
        };
        let device = DeviceOptions { id: options.device as i32, timeout: options.timeout, blocking: options.blocking };
        let owner = Arc::new(Owner::start(acl, name.clone(), device, chip, no_graphs(options, chip))?);
        let masks = Buffer::with(&owner, encode(&mask_rows(), DataType::F32))?;
        let blocks = quant::offered(chip, &acl.operators, activations);
        let caps = caps(name, soc, chip, options.activations, blocks);
        let forms = Forms::new(!options.fused);
        let place = Place::alone();
        Ok(Self {
            caps,
            chip,
            activations,
            forms,
            owner,
            place,
            masks,
            windows: Mutex::default(),
            drawer: Mutex::default(),
        })
    }

    /// Opens several devices as the ranks of one model, in this order; `options.device` is none of them.
    ///
    /// # Errors
    /// As [`AscendBackend::new`], and [`DeviceError::Execution`] if they cannot be joined.
    pub fn ranks(options: &AscendOptions, devices: &[u32]) -> Result<Vec<Self>> {
        let open = |&device| Self::new(&AscendOptions { device, ..options.clone() });
        let mut backends: Vec<_> = devices.iter().map(open).collect::<Result<_>>()?;
        let owners: Vec<_> = backends.iter().map(|backend| backend.owner.clone()).collect();
        let places = ranks::join(&owners)?;
        backends.iter_mut().zip(places).for_each(|(backend, place)| backend.place = place);
        Ok(backends)
    }

    /// Memory of the device that is in use here, was, and is reserved.
    ///
    /// # Errors
    /// What failed on the device before.
    pub fn memory_use(&self) -> Result<MemoryUse> {
        self.owner.call("memory", |device| Ok(device.usage()))
    }

    /// The form that operations take, a line for each shape met so far, with what speaks against a better one; and how what
    /// lies between them goes to the device.
    pub fn forms(&self) -> Vec<String> {
        let launches = match self.owner.objection() {
            None => "launches between attention, in small steps: graphs".into(),
            Some(objection) => format!("launches between attention: one by one (not new graphs: {objection})"),
        };
        let mut lines = self.forms.lines();
        lines.push(launches);
        lines
    }

    /// Queues work on `rows` rows: none is no work, and the calls of few are collected.
    pub(crate) fn queue(
        &self,
        op: &'static str,
        rows: usize,
        work: impl FnOnce(&mut Device) -> std::result::Result<(), AscendError> + Send + 'static,
    ) -> Result<()> {
        match rows {
            0 => Ok(()),
            1..=MOST_ROWS => self.owner.submit(op, move |device| device.collect(op, work)),
            _ => self.owner.submit(op, work),
        }
    }

    pub(crate) fn masks(&self) -> View {
        View::new(self.masks.address(), DataType::F32, &[2 * (BLOCK + 1), BLOCK])
    }
}

/// Why no graphs are made at all.
fn no_graphs(options: &AscendOptions, chip: Chip) -> Option<String> {
    let composed = (!options.fused).then(|| "fused forms are off".to_owned());
    let blocking = options.blocking.then(|| "every operator is waited for".to_owned());
    composed.or(blocking).or_else(|| graphs::objection(chip))
}

/// What a chip offers with activations of a type.
fn caps(device: String, isa: String, chip: Chip, activations: DType, blocks: Vec<WeightFormat>) -> Caps {
    let mut weight_formats = BTreeSet::from([WeightFormat::F32, WeightFormat::F16]);
    weight_formats.extend(chip.has_bf16().then_some(WeightFormat::BF16));
    weight_formats.extend(blocks);
    let mut narrow_activations = BTreeSet::new();
    if activations != DType::F32 {
        narrow_activations.extend(weight_formats.iter().filter(|format| **format != WeightFormat::F32));
    }
    // It multiplies f32 in f16.
    narrow_activations.extend((chip == Chip::P310).then_some(WeightFormat::F32));
    let kv_dtype = match activations {
        DType::F16 => KvDtype::F16,
        DType::BF16 => KvDtype::BF16,
        _ => KvDtype::F32,
    };
    Caps {
        device,
        isa,
        threads: 1,
        kv_block_size: BLOCK,
        kv_dtypes: [kv_dtype].into(),
        activations,
        ops: BTreeSet::from([Op::PagedAttention, Op::LatentAttention, Op::FusedMoe]),
        narrow_activations,
        weight_formats,
        row_invariant: false,
        // Sampled tokens are chosen on the host.
        runs_ahead: false,
        // Graphs are of what lies between two attentions, and rows that pad would have their attention too.
        replays_steps: false,
    }
}

/// The device does not look whether a row is there.
fn below(numbers: &[u32], rows: usize) {
    assert!(numbers.iter().all(|&n| (n as usize) < rows), "a number of a row that is not among {rows}");
}

/// Numbers of rows, tokens and slots as the device takes them.
fn indices(numbers: &[u32]) -> Vec<i32> {
    numbers.iter().map(|&n| i32::try_from(n).expect("fewer than 2^31 rows")).collect()
}

/// Rotary tables, `[positions, 2, pairs]`: cosines, then sines, in f32.
pub struct Rope {
    table: View,
    /// Keeps the memory.
    _buffer: Buffer,
}

impl Backend for AscendBackend {
    type Tensor = Tensor;
    type Vector = Vector;
    type Linear = Linear;
    type Rope = Rope;
    type KvCache = KvCache;
    type AttentionPlan = AttentionPlan;
    /// On the host: the device finds the largest, every other draw is the host's.
    type Chosen = Chosen;

    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn world(&self) -> World {
        self.place.world
    }

    fn memory(&self) -> Result<Option<DeviceMemory>> {
        let ((free, total), own) = self.owner.call("memory", |device| Ok((device.memory()?, device.usage())))?;
        let MemoryUse { reserved, used, .. } = own;
        Ok(Some(DeviceMemory { total: total as u64, free: (free + reserved - used) as u64 }))
    }

    fn tensor(&self, capacity: usize, cols: usize) -> Result<Tensor> {
        Tensor::new(&self.owner, capacity, cols, self.activations)
    }

    fn vector(&self, src: &HostTensor<'_>) -> Result<Vector> {
        Vector::new(&self.owner, &src.to_f32(), self.activations)
    }

    fn linear_weight(&self, src: &HostLinear<'_>) -> Result<Linear> {
        Linear::new(self, src)
    }

    fn rope_table(&self, src: &HostRope) -> Result<Rope> {
        let (cos, sin) = src.tables();
        let pairs = src.inv_freq.len();
        let rows = cos.chunks_exact(pairs).zip(sin.chunks_exact(pairs));
        let table: Vec<f32> = rows.flat_map(|(cos, sin)| cos.iter().chain(sin).copied()).collect();
        let buffer = Buffer::with(&self.owner, encode(&table, DataType::F32))?;
        let table = View::new(buffer.address(), DataType::F32, &[src.max_positions, 2, pairs]);
        Ok(Rope { table, _buffer: buffer })
    }

    fn kv_cache(&self, spec: &KvSpec, blocks: KvBlocks) -> Result<KvCache> {
        KvCache::new(&self.owner, spec, blocks.kept)
    }

    fn plan_attention(&self, batch: &AttentionBatch<'_>) -> Result<AttentionPlan> {
        let windows: Vec<usize> = self.windows.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        Ok(AttentionPlan::new(&self.owner, batch, windows, &self.forms.parts()))
    }

    fn embed(&self, ids: TokenIds<'_, Self::Chosen>, table: &Linear, out: &mut Tensor) -> Result<()> {
        let ids = &*ids.on_host();
        assert!(table.is_table, "rows are looked up in what was prepared as a table");
        assert_eq!(out.cols(), table.in_features, "width of an embedding");
        below(ids, table.out_features);
        let (ids, out) = (indices(ids), out.output(ids.len(), table.dtype()));
        let table = table.view();
        self.queue("embed", ids.len(), move |device| linear::embed(device, &ids, &table, &out))
    }

    fn rms_norm(&self, x: &Tensor, weight: &Vector, eps: f32, out: &mut Tensor) -> Result<()> {
        assert_eq!(x.cols(), out.cols(), "width of a norm");
        let (x, gamma) = (x.view(), self.norm_weight(x, weight));
        let out = out.output(x.dims[0] as usize, x.dtype);
        self.queue("rms_norm", x.dims[0] as usize, move |device| rows::rms_norm(device, &x, &gamma, eps, &out))
    }

    fn rms_norm_in_place(&self, x: &mut Tensor, weight: &Vector, eps: f32) -> Result<()> {
        let (rows, gamma, x) = (x.rows(), self.norm_weight(x, weight), x.view());
        self.queue("rms_norm_in_place", rows, move |device| rows::rms_norm(device, &x, &gamma, eps, &x))
    }

    fn add_rms_norm(
        &self,
        x: &Tensor,
        residual: &mut Tensor,
        weight: &Vector,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        let shape = NormShape { width: weight.len(), dtype: x.dtype() };
        // The operator takes a weight in the type of the rows.
        let alike = x.dtype() == residual.dtype() && weight.len() == x.cols() && weight.is_exact(shape.dtype);
        if !alike || x.rows() == 0 || !forms::sum_and_norm(self, shape)? {
            self.add(residual, x)?;
            return self.rms_norm(residual, weight, eps, out);
        }
        assert_eq!((x.rows(), x.cols(), x.cols()), (residual.rows(), residual.cols(), out.cols()), "shapes of a sum");
        let (rows, x, residual, gamma) = (x.rows(), x.view(), residual.view(), weight.view(shape.dtype));
        let out = out.output(rows, shape.dtype);
        self.queue("add_rms_norm", rows, move |device| add_rms_norm(device, &x, &residual, &gamma, eps, &out))
    }

    fn scale(&self, x: &mut Tensor, factor: f32) -> Result<()> {
        let (rows, x) = (x.rows(), x.view());
        self.queue("scale", rows, move |device| rows::scale(device, &x, factor))
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        let (rows, before) = (x.rows(), x.view());
        let after = x.output(rows, DataType::F32);
        self.queue("softcap", rows, move |device| {
            device.with_type(&before, DataType::F32, |device, x| {
                rows::softcap(device, x, cap)?;
                if *x == after { Ok(()) } else { device.assign(&after, x) }
            })
        })
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()), "shapes of a sum");
        let (rows, x, y) = (x.rows(), x.view(), y.view());
        self.queue("add", rows, move |device| rows::add(device, &x, &y))
    }

    fn linear(&self, x: &Tensor, weight: &Linear, out: &mut Tensor) -> Result<()> {
        self.linear_group(x, &mut [(weight, out)])
    }

    fn linear_group(&self, x: &Tensor, group: &mut [(&Linear, &mut Tensor)]) -> Result<()> {
        let views = group.iter_mut().map(|(weight, out)| {
            assert_eq!((x.cols(), out.cols()), (weight.in_features, weight.out_features), "widths of a product");
            (weight.view(), out.output(x.rows(), weight.dtype()))
        });
        let (rows, x, views) = (x.rows(), x.view(), views.collect::<Vec<_>>());
        self.queue("linear", rows, move |device| linear_group(device, &x, &views))
    }

    fn rope(&self, x: &mut Tensor, layout: RopeLayout, table: &Rope, plan: &AttentionPlan) -> Result<()> {
        let (step, table) = (plan.step(), table.table.clone());
        assert_eq!((x.rows(), x.cols()), (step.rows, layout.heads * layout.head_dim), "shape of rotated heads");
        assert_eq!(layout.dim as i64, 2 * table.dims[2], "rotated columns");
        let (rows, x) = (x.rows(), x.view());
        self.queue("rope", rows, move |device| rope::rope(device, &x, layout, &table, &step))
    }

    fn gated_activation(&self, activation: Activation, gate: &Tensor, up: &Tensor, out: &mut Tensor) -> Result<()> {
        assert_eq!((gate.rows(), gate.cols()), (up.rows(), up.cols()), "shapes of gate and up");
        assert_eq!(gate.cols(), out.cols(), "width of a gated activation");
        let (rows, gate, up) = (gate.rows(), gate.view(), up.view());
        let out = out.output(rows, gate.dtype);
        self.queue("gated_activation", rows, move |device| rows::gated(device, activation, &gate, &up, &out))
    }

    fn paged_attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        params: &AttentionParams,
        out: &mut Tensor,
    ) -> Result<()> {
        let AttentionParams { heads, kv_heads, head_dim, window, .. } = *params;
        let (step, planes, params) = (plan.step(), cache.planes(layer), *params);
        for (x, heads) in [(q, heads), (k, kv_heads), (v, kv_heads)] {
            assert_eq!((x.rows(), x.cols()), (step.rows, heads * head_dim), "shape of heads");
        }
        assert_eq!((out.cols(), planes[0].dims[1] as usize), (q.cols(), k.cols()), "widths of attention");
        self.windows.lock().unwrap_or_else(PoisonError::into_inner).extend(window);
        if q.rows() == 0 {
            out.output(0, q.dtype());
            return Ok(());
        }
        self.write_cache(&step, [k, v], &planes, kv_heads, layer)?;
        let (rows, dtype) = (q.rows(), planes[0].dtype);
        let blocks = planes[0].dims[0] as usize / BLOCK;
        let out = out.output(rows, q.dtype());
        let q = q.view();
        if q.dtype == dtype && forms::attention(self, &params, dtype, layer)? {
            let (step, mask) = (plan.step_with(Part::Whole), self.mask()?);
            return self.queue("paged_attention", rows, move |device| {
                step.calls(device, Part::Whole, blocks)?.into_iter().try_for_each(|(rows, step)| {
                    let [q, out] = [&q, &out].map(|x| x.narrow(0, rows.start, rows.len()));
                    fused_attention::attend(device, &q, planes.each_ref(), &step, &mask, &params, &out)
                })
            });
        }
        let (step, masks) = (plan.step_with(Part::Composed), self.masks());
        self.queue("paged_attention", rows, move |device| {
            attention::paged(device, &step, &params, &masks, &q, &planes, &out)
        })
    }

    fn all_reduce(&self, x: &mut Tensor) -> Result<()> {
        if self.place.world.size == 1 {
            return Ok(());
        }
        self.place.all_here(&self.caps.device)?;
        let (rows, x) = (x.rows(), x.view());
        self.queue("all_reduce", rows, move |device| device.all_reduce(&x))
    }

    fn leave(&self) {
        self.place.leave();
    }

    fn rejoin(&self) -> Result<()> {
        self.place.all_here(&self.caps.device)
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        assert_eq!(x.cols(), out.cols(), "width of gathered rows");
        below(rows, x.rows());
        let (x, rows) = (x.view(), indices(rows));
        let out = out.output(rows.len(), x.dtype);
        self.queue("gather_rows", rows.len(), move |device| index::gather(device, &x, &rows, &out))
    }

    fn add_rows(&self, x: &Tensor, rows: &[u32], out: &mut Tensor) -> Result<()> {
        assert_eq!((x.rows(), x.cols()), (rows.len(), out.cols()), "shape of added rows");
        below(rows, out.rows());
        let (x, rows, out) = (x.view(), indices(rows), out.view());
        self.queue("add_rows", rows.len(), move |device| index::add_rows(device, &x, &rows, &out))
    }

    fn clear_blocks(&self, cache: &mut KvCache, blocks: &[u32], _: &[u32]) -> Result<()> {
        cache.clear(&self.owner, blocks)
    }

    fn write(&self, data: &[f32], out: &mut Tensor) -> Result<()> {
        assert!(data.len().is_multiple_of(out.cols()), "{} numbers in rows of {}", data.len(), out.cols());
        let out = out.output(data.len() / out.cols(), self.activations);
        let bytes = encode(data, out.dtype);
        self.queue("write", bytes.len(), move |device| device.upload(&bytes, out.base))
    }

    fn read(&self, x: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        if x.rows() > 0 {
            let x = x.view();
            *out = self.owner.call("read", move |device| rows::read(device, &x))?;
        }
        Ok(())
    }

    fn choose(&self, logits: &Tensor, draws: &[Draw]) -> Result<Chosen> {
        assert_eq!(logits.rows(), draws.len(), "a draw for each row");
        if draws.is_empty() {
            return Ok(Chosen::Told(Vec::new()));
        }
        if draws.iter().all(Draw::takes_the_largest) {
            let x = logits.view();
            return self.owner.call("argmax", move |device| index::argmax(device, &x)).map(Chosen::Told);
        }
        let mut values = Vec::new();
        self.read(logits, &mut values)?;
        let mut drawer = self.drawer.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Chosen::Told(drawer.choose(&values, logits.cols(), draws)))
    }

    fn submit(&self) -> Result<Chosen> {
        self.owner.submit("submit", Device::end_piece)?;
        Ok(Chosen::UnderWay)
    }

    fn read_chosen(&self, chosen: &Chosen, out: &mut Vec<Option<u32>>) -> Result<()> {
        out.clear();
        match chosen {
            Chosen::UnderWay => self.owner.call("step", Device::synchronize),
            Chosen::Told(tokens) => {
                out.extend(tokens);
                Ok(())
            }
        }
    }
}

impl AscendBackend {
    /// The weight of a norm over x, in the type that the chip's operator takes with it.
    fn norm_weight(&self, x: &Tensor, weight: &Vector) -> View {
        assert!(x.cols().is_multiple_of(weight.len()), "a norm over {} of {} columns", weight.len(), x.cols());
        weight.view(if self.chip == Chip::P310 { x.dtype() } else { DataType::F32 })
    }
}

impl AscendBackend {
    /// Writes a step's rows, two for each token, to the planes of a layer.
    pub(crate) fn write_cache(
        &self,
        step: &Arc<Step>,
        rows: [&Tensor; 2],
        planes: &[View; 2],
        heads: usize,
        layer: usize,
    ) -> Result<()> {
        let dtype = planes[0].dtype;
        let widths = planes.each_ref().map(|plane| plane.dims[1] as usize / heads);
        let alike = rows.iter().all(|rows| rows.dtype() == dtype);
        let fused = alike && forms::cache_write(self, CacheShape { heads, widths, dtype }, layer)?;
        let (step, rows, planes) = (step.clone(), rows.map(Tensor::view), planes.clone());
        self.queue("cache write", step.rows, move |device| {
            attention::write(device, &step, fused, heads, rows.each_ref(), &planes)
        })
    }
}
