//! Instruction sets: which the machine has, and how a kernel is run with one of them.

use std::fmt;

#[cfg(target_arch = "aarch64")]
use crate::simd::neon::Neon;
use crate::simd::{Kernel, PairKernel, portable::Portable};
#[cfg(target_arch = "x86_64")]
use crate::simd::{avx2::Avx2, avx512::Avx512, avx512::Bf16};

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// What every machine of the architecture has.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
    /// The same with BF16.
    Avx512Bf16,
    /// aarch64.
    Neon,
    /// aarch64 with dot products of bytes.
    NeonDotprod,
}

impl Isa {
    const ALL: [Isa; 6] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Neon, Isa::NeonDotprod];

    /// The best that this machine has.
    pub fn detect() -> Isa {
        *Self::available().last().expect("portable is always there")
    }

    /// All that this machine has, the best last.
    pub fn available() -> Vec<Isa> {
        Self::ALL.into_iter().filter(|isa| isa.dispatch().is_some()).collect()
    }

    /// `None` if the machine lacks it.
    pub(crate) fn dispatch(self) -> Option<Dispatch> {
        match self {
            Isa::Portable => Some(Dispatch::Portable(Portable)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().map(Dispatch::Avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::detect().map(Dispatch::Avx512),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Bf16::detect().map(Dispatch::Avx512Bf16),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::detect().map(Dispatch::Neon),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDotprod => Neon::detect().map(Dispatch::NeonDotprod),
            #[allow(unreachable_patterns)] // which patterns are left depends on the architecture
            _ => None,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Neon => "neon",
            Isa::NeonDotprod => "neon-dotprod",
        })
    }
}

/// An instruction set known to be there.
#[derive(Clone, Copy)]
pub(crate) enum Dispatch {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Bf16),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon<false>),
    #[cfg(target_arch = "aarch64")]
    NeonDotprod(Neon<true>),
}

impl Dispatch {
    /// Runs a kernel as compiled for this instruction set.
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self {
            Dispatch::Portable(s) => kernel.run(s),
            #[cfg(target_arch = "x86_64")]
            Dispatch::Avx2(s) => s.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Dispatch::Avx512(s) => s.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Dispatch::Avx512Bf16(s) => s.base().run(kernel),
            #[cfg(target_arch = "aarch64")]
            Dispatch::Neon(s) => s.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Dispatch::NeonDotprod(s) => s.run(kernel),
        }
    }

    /// Whether it multiplies pairs of bf16.
    pub(crate) fn has_pairs(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Dispatch::Avx512Bf16(_) => true,
            _ => false,
        }
    }

    /// Runs a kernel that multiplies pairs of bf16.
    ///
    /// # Panics
    /// If this instruction set does not.
    pub(crate) fn run_pairs<K: PairKernel>(self, kernel: K) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Dispatch::Avx512Bf16(s) => s.run(kernel),
            _ => {
                let _ = kernel;
                panic!("pairs of bf16 on an instruction set without them")
            }
        }
    }
}
