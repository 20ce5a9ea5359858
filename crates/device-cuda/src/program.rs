//! Kernels: CUDA C++ that lies in the binary as text, compiled for the GPU that is found.
//!
//! A kernel is asked for by a C++ name expression (`rms_norm<bf16>`). Those of one source file that were asked for since
//! the last time are compiled together, files and parts of them side by side. Invariant: a kernel that was asked for once is the same for
//! everybody who asks again, and is compiled once.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use baton_device::{DeviceError, Result};
use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule, CUresult, CUstream};

use crate::compiler::{self, Image, Target, Unit};
use crate::context::{Context, Handle, Owned};
use crate::gpu::Launch;

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Norms, sums, functions of single numbers, copies of rows.
    Rows,
    /// Tokens from logits.
    Choose,
    /// Products with weights, rows of weights.
    Linear,
    /// Attention over keys and values.
    Attention,
    /// Attention over latents.
    Latent,
    /// Heads on their way to attention: normed, rotated, written to the cache.
    Heads,
    /// Experts: choosing them, few rows, sums.
    Moe,
    /// Experts on tensor cores.
    MoeGrouped,
}

/// Headers that sources may include.
pub(crate) const HEADERS: [(&CStr, &str); 6] = [
    (c"activation.cuh", include_str!("../kernels/activation.cuh")),
    (c"baton.cuh", include_str!("../kernels/baton.cuh")),
    (c"blocks.cuh", include_str!("../kernels/blocks.cuh")),
    (c"coded.cuh", include_str!("../kernels/coded.cuh")),
    (c"moe.cuh", include_str!("../kernels/moe.cuh")),
    (c"context.cuh", include_str!("../kernels/context.cuh")),
];

/// Kernels of a source that are compiled together, at most: some tenths of a second each, against one for reading the source
/// anew on another processor.
const TOGETHER: usize = 16;

/// Shared memory that a block may have, static and dynamic together, without the kernel being told so.
const SHARED: i32 = 48 << 10;

impl Source {
    /// All of them.
    pub const ALL: [Source; 8] = [
        Source::Rows,
        Source::Choose,
        Source::Linear,
        Source::Attention,
        Source::Latent,
        Source::Heads,
        Source::Moe,
        Source::MoeGrouped,
    ];

    /// The file's name.
    pub const fn file(self) -> &'static str {
        match self {
            Source::Rows => "rows.cu",
            Source::Choose => "choose.cu",
            Source::Linear => "linear.cu",
            Source::Attention => "attention.cu",
            Source::Latent => "latent.cu",
            Source::Heads => "heads.cu",
            Source::Moe => "moe.cu",
            Source::MoeGrouped => "moe_grouped.cu",
        }
    }

    /// Its text.
    pub const fn text(self) -> &'static str {
        match self {
            Source::Rows => include_str!("../kernels/rows.cu"),
            Source::Choose => include_str!("../kernels/choose.cu"),
            Source::Linear => include_str!("../kernels/linear.cu"),
            Source::Attention => include_str!("../kernels/attention.cu"),
            Source::Latent => include_str!("../kernels/latent.cu"),
            Source::Heads => include_str!("../kernels/heads.cu"),
            Source::Moe => include_str!("../kernels/moe.cu"),
            Source::MoeGrouped => include_str!("../kernels/moe_grouped.cu"),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.file())
    }
}

/// A kernel, compiled or to be.
#[derive(Debug, Clone)]
pub(crate) struct Kernel(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    function: OnceLock<Function>,
}

#[derive(Debug)]
struct Function {
    handle: Handle<CUfunction>,
    /// Bytes of dynamic shared memory that it may have without being told so, and the most that it may have then.
    untold: i32,
    most: i32,
    /// The result of telling it.
    told: OnceLock<CUresult>,
}

impl Kernel {
    /// Its function, if it is compiled.
    pub(crate) fn function(&self) -> Option<CUfunction> {
        self.0.function.get().map(|function| function.handle.0)
    }

    /// Puts it on a stream.
    pub(crate) fn launch(
        &self,
        context: &Context,
        launch: &Launch,
        args: &mut [*mut c_void],
        stream: CUstream,
    ) -> Result<()> {
        let Launch { grid, block, shared } = *launch;
        let Function { handle, untold, most, told } = self.0.function.get().expect("compiled");
        if i64::from(shared) > i64::from(*untold) {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of this context.
            let tell = || unsafe { sys::cuFuncSetAttribute(handle.0, attribute, *most) };
            context.check("cuFuncSetAttribute", *told.get_or_init(tell))?;
        }
        // SAFETY: arguments as the kernel's signature has them, which is its caller's to know; what they point to lives until
        // the call returns.
        let code = unsafe {
            sys::cuLaunchKernel(
                handle.0,
                grid[0],
                grid[1],
                grid[2],
                block[0],
                block[1],
                block[2],
                shared,
                stream,
                args.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        match code {
            CUresult::CUDA_SUCCESS => Ok(()),
            code => Err(context.failure("launch", code, &format!("{} {launch:?}", self.0.name))),
        }
    }
}

/// Kernels that were asked for, and the modules of those that are compiled.
pub(crate) struct Programs {
    target: Target,
    cache: Option<PathBuf>,
    kernels: BTreeMap<(Source, String), Kernel>,
    modules: Vec<Owned<CUmodule>>,
}

impl Programs {
    pub(crate) fn new(capability: (i32, i32), cache: Option<PathBuf>) -> Self {
        let cache = cache.filter(|folder| match compiler::own(folder) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(folder = %folder.display(), %error, "compiled kernels are kept in memory alone");
                false
            }
        });
        Self { target: Target::Chip(capability), cache, kernels: BTreeMap::new(), modules: Vec::new() }
    }

    /// The kernel of a name expression.
    pub(crate) fn kernel(&mut self, source: Source, name: String) -> Kernel {
        let new = || Kernel(Arc::new(Inner { name: name.clone(), function: OnceLock::new() }));
        self.kernels.entry((source, name.clone())).or_insert_with(new).clone()
    }

    /// Everything that was asked for.
    pub(crate) fn names(&self) -> Vec<(Source, String)> {
        self.kernels.keys().cloned().collect()
    }

    /// Compiles what is not yet.
    pub(crate) fn compile(&mut self, context: &Arc<Context>) -> Result<()> {
        let mut by_source: BTreeMap<Source, Vec<Kernel>> = BTreeMap::new();
        for ((source, _), kernel) in self.kernels.iter().filter(|(_, kernel)| kernel.function().is_none()) {
            by_source.entry(*source).or_default().push(kernel.clone());
        }
        let mut wanted: Vec<(Source, &[Kernel])> = Vec::new();
        for (source, kernels) in &by_source {
            wanted.extend(kernels.chunks(TOGETHER).map(|part| (*source, part)));
        }
        let (target, cache) = (self.target, self.cache.as_deref());
        let images = std::thread::scope(|scope| {
            let image = |(source, kernels): &(Source, &[Kernel])| {
                let (source, names) = (*source, kernels.iter().map(|kernel| kernel.0.name.clone()).collect::<Vec<_>>());
                scope.spawn(move || {
                    let unit = Unit { source, names, target };
                    unit.image(cache).map(|image| (unit, image))
                })
            };
            let threads: Vec<_> = wanted.iter().map(image).collect();
            threads.into_iter().map(|thread| thread.join().expect("a compiler's thread")).collect::<Vec<_>>()
        });
        context.enter()?;
        for ((_, kernels), image) in wanted.into_iter().zip(images) {
            let failed = |reason| DeviceError::Execution { device: context.name.clone(), op: "compile", reason };
            let (unit, image) = image.map_err(failed)?;
            let (module, image) = match load(context, &image) {
                Ok(module) => (module, image),
                Err(error) if context.whole().is_err() => return Err(error),
                // It may have come from disk, and be of another driver's making.
                Err(_) => {
                    let image = unit.fresh(cache).map_err(failed)?;
                    (load(context, &image)?, image)
                }
            };
            let handle = module.get();
            self.modules.push(module);
            for (kernel, lowered) in kernels.iter().zip(&image.lowered) {
                let function = function(context, handle, lowered)?;
                kernel.0.function.set(function).expect("compiled once: its owner holds a lock");
            }
        }
        Ok(())
    }
}

fn load(context: &Arc<Context>, image: &Image) -> Result<Owned<CUmodule>> {
    let mut module = std::ptr::null_mut();
    // SAFETY: a valid out pointer, and a whole image: NVRTC made it, and PTX ends in zero.
    let code = unsafe { sys::cuModuleLoadData(&raw mut module, image.code.as_ptr().cast()) };
    context.check("cuModuleLoadData", code)?;
    // SAFETY: loaded once, and nothing of it runs.
    Ok(Owned::new(context, module, |module| _ = unsafe { sys::cuModuleUnload(module) }))
}

fn function(context: &Context, module: CUmodule, lowered: &CStr) -> Result<Function> {
    let (mut function, mut fixed) = (std::ptr::null_mut(), 0);
    // SAFETY: valid out pointers, a text that ends in zero, a module of this context.
    unsafe {
        context.check("cuModuleGetFunction", sys::cuModuleGetFunction(&raw mut function, module, lowered.as_ptr()))?;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        context.check("cuFuncGetAttribute", sys::cuFuncGetAttribute(&raw mut fixed, attribute, function))?;
    }
    let most = context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    Ok(Function { handle: Handle(function), untold: SHARED - fixed, most: most - fixed, told: OnceLock::new() })
}
