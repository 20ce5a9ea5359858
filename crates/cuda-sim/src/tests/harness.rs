//! One test at a time on the state of the process: a device, a context, a stream, and short forms of the calls.

use std::{
    ffi::{CString, c_void},
    ptr::{null, null_mut},
    sync::{Mutex, MutexGuard, PoisonError},
};

pub use crate::can_compile;
pub use crate::{
    api::exports::*,
    codes::*,
    control::cuda_sim_control,
    report::{cuda_sim_count, cuda_sim_reset},
};

/// A thread with device 0's context and a stream.
pub struct Session {
    pub context: u64,
    pub stream: u64,
    _turn: MutexGuard<'static, ()>,
}

/// What a call makes, which must succeed.
#[track_caller]
pub fn made<T: Default>(call: impl FnOnce(*mut T) -> i32) -> T {
    let mut out = T::default();
    let code = call(&mut out);
    assert_eq!(code, 0, "{:?}", crate::machine::lock().counters.messages);
    out
}

#[track_caller]
pub fn well(code: i32) {
    assert_eq!(code, 0, "{:?}", crate::machine::lock().counters.messages);
}

#[track_caller]
pub fn control(text: &str) {
    let text = CString::new(text).unwrap();
    // SAFETY: the text ends in zero.
    well(unsafe { cuda_sim_control(text.as_ptr()) });
}

pub fn count(name: &str) -> u64 {
    let name = CString::new(name).unwrap();
    // SAFETY: the text ends in zero.
    unsafe { cuda_sim_count(name.as_ptr()) }
}

/// Something said words like these.
#[track_caller]
pub fn assert_said(words: &str) {
    let m = crate::machine::lock();
    assert!(m.counters.messages.iter().any(|text| text.contains(words)), "{words:?} in {:?}", m.counters.messages);
}

impl Session {
    pub fn new() -> Self {
        Self::with("devices=2")
    }

    /// With a setting beside the usual ones.
    pub fn with(setting: &str) -> Self {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        control("default");
        control("devices=2");
        well(cuInit(0));
        (0..2).for_each(|device| well(cuDevicePrimaryCtxReset_v2(device)));
        control(setting);
        cuda_sim_reset();
        let context = made(|out| cuDevicePrimaryCtxRetain(out, 0));
        well(cuCtxSetCurrent(context));
        let stream = made(|out| cuStreamCreate(out, flag::STREAM_NON_BLOCKING));
        Self { context, stream, _turn: turn }
    }

    pub fn alloc(&self, bytes: usize) -> u64 {
        made(|out| cuMemAlloc_v2(out, bytes))
    }

    /// Device memory with these values in it.
    pub fn upload<T: Copy>(&self, values: &[T]) -> u64 {
        let address = self.alloc(size_of_val(values));
        well(cuMemcpyHtoD_v2(address, values.as_ptr() as u64, size_of_val(values)));
        address
    }

    /// What the device holds behind everything that the stream was given.
    #[track_caller]
    pub fn download<T: Copy + Default>(&self, address: u64, count: usize) -> Vec<T> {
        let mut values = vec![T::default(); count];
        well(cuMemcpyDtoHAsync_v2(values.as_mut_ptr() as u64, address, count * size_of::<T>(), self.stream));
        values
    }

    /// A kernel of a source, by name expression.
    pub fn kernel(&self, source: &str, expression: &str) -> u64 {
        let image = compile(source, &[], &[expression], &["--gpu-architecture=sm_90"]).expect("it compiles");
        // SAFETY: the compiler gave the image.
        let module = made(|out| unsafe { cuModuleLoadData(out, image.0.as_ptr()) });
        let name = CString::new(image.1[0].as_str()).unwrap();
        // SAFETY: the text ends in zero.
        made(|out| unsafe { cuModuleGetFunction(out, module, name.as_ptr()) })
    }

    /// A launch of one-dimensional grid and block, whose code is returned.
    pub fn launch(&self, kernel: u64, grid: u32, block: u32, shared: u32, arguments: &[&dyn Argument]) -> i32 {
        let pointers: Vec<*const c_void> = arguments.iter().map(|argument| (**argument).pointer()).collect();
        // SAFETY: tests give as many arguments as their kernels have parameters.
        unsafe { cuLaunchKernel(kernel, grid, 1, 1, block, 1, 1, shared, self.stream, pointers.as_ptr(), null()) }
    }

    pub fn synchronize(&self) -> i32 {
        cuStreamSynchronize(self.stream)
    }
}

/// What a kernel can be given.
pub trait Argument {
    fn pointer(&self) -> *const c_void;
}

impl<T: Copy> Argument for T {
    fn pointer(&self) -> *const c_void {
        (&raw const *self).cast()
    }
}

/// Image and lowered names of a program, or the code and the log.
pub fn compile(
    source: &str,
    headers: &[(&str, &str)],
    expressions: &[&str],
    options: &[&str],
) -> Result<(Vec<u8>, Vec<String>), (i32, String)> {
    let c = |text: &str| CString::new(text).unwrap();
    let (source, name) = (c(source), c("test.cu"));
    let names: Vec<_> = headers.iter().map(|(name, _)| c(name)).collect();
    let texts: Vec<_> = headers.iter().map(|(_, text)| c(text)).collect();
    let options: Vec<_> = options.iter().map(|option| c(option)).collect();
    let expressions: Vec<_> = expressions.iter().map(|expression| c(expression)).collect();
    let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
    // SAFETY: all texts end in zero and live until the end; buffers are as large as was asked.
    unsafe {
        let (texts, names, options) = (pointers(&texts), pointers(&names), pointers(&options));
        let mut program = made(|out| {
            nvrtcCreateProgram(out, source.as_ptr(), name.as_ptr(), names.len() as i32, texts.as_ptr(), names.as_ptr())
        });
        for expression in &expressions {
            well(nvrtcAddNameExpression(program, expression.as_ptr()));
        }
        let code = nvrtcCompileProgram(program, options.len() as i32, options.as_ptr());
        let mut log = vec![0u8; made(|out| nvrtcGetProgramLogSize(program, out))];
        well(nvrtcGetProgramLog(program, log.as_mut_ptr().cast()));
        let result = if code != 0 {
            Err((code, String::from_utf8_lossy(&log[..log.len() - 1]).into_owned()))
        } else {
            let mut image = vec![0u8; made(|out| nvrtcGetPTXSize(program, out))];
            well(nvrtcGetPTX(program, image.as_mut_ptr().cast()));
            let lowered = expressions.iter().map(|expression| {
                let mut name = null();
                well(nvrtcGetLoweredName(program, expression.as_ptr(), &mut name));
                std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned()
            });
            Ok((image, lowered.collect()))
        };
        well(nvrtcDestroyProgram(&mut program));
        assert_eq!(program, null_mut::<c_void>() as u64);
        result
    }
}
