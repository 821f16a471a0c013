//! The instructions that the kernels use: the widest of the processor.

use std::{
    fmt,
    sync::{
        OnceLock,
        atomic::{AtomicU8, Ordering},
    },
};

use serde::{Deserialize, Serialize};

/// Sets of vector instructions; each holds those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Instructions {
    /// Instructions that every processor of the architecture has.
    Portable,
    /// 8 lanes, fused multiply-add.
    Avx2,
    /// 16 lanes.
    Avx512,
    /// Products of pairs of bf16 in 16 lanes.
    Avx512Bf16,
    /// Products of tiles of bf16.
    Amx,
}

static IN_USE: OnceLock<Instructions> = OnceLock::new();

/// The lowest limit so far, as a number.
static LIMIT: AtomicU8 = AtomicU8::new(u8::MAX);

impl Instructions {
    /// The set that the kernels of this process use.
    pub fn in_use() -> Self {
        let is_allowed = |set: &Self| *set as u8 <= LIMIT.load(Ordering::Relaxed);
        let best = || {
            let best = Self::best();
            let sets = [Self::Amx, Self::Avx512Bf16, Self::Avx512, Self::Avx2];
            sets.into_iter().filter(|set| *set <= best).find(is_allowed).unwrap_or(Self::Portable)
        };
        *IN_USE.get_or_init(best)
    }

    /// Limits the instructions to this set, for measurements and tests. Of several limits the
    /// lowest counts. It has no effect after the first kernel has run.
    pub fn limit(self) {
        LIMIT.fetch_min(self as u8, Ordering::Relaxed);
    }

    #[cfg(target_arch = "x86_64")]
    fn best() -> Self {
        let has_avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq");
        let has_avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        if !has_avx2 {
            Self::Portable
        } else if !has_avx512 {
            Self::Avx2
        } else if !is_x86_feature_detected!("avx512bf16") {
            Self::Avx512
        } else if has_amx() {
            Self::Amx
        } else if is_intel() {
            // Intel's processors without AMX, as in some virtual machines. Their products of bf16
            // take 1.5 times as long as those of f32; AMD's take half as long.
            Self::Avx512
        } else {
            Self::Avx512Bf16
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn best() -> Self {
        Self::Portable
    }
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
    name.as_flattened() == b"GenuineIntel"
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use amx::is_available as has_amx;

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn has_amx() -> bool {
    false
}

impl fmt::Display for Instructions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "AVX2",
            Self::Avx512 => "AVX-512",
            Self::Avx512Bf16 => "AVX-512 BF16",
            Self::Amx => "AMX",
        })
    }
}

/// Declares a token without a size. Whoever holds one knows that the processor has the instructions
/// and that they are in use.
macro_rules! token {
    ($name:ident) => {
        #[cfg(target_arch = "x86_64")]
        #[derive(Clone, Copy)]
        pub(super) struct $name(());

        #[cfg(target_arch = "x86_64")]
        impl $name {
            pub(super) fn in_use() -> Option<Self> {
                (Instructions::in_use() >= Instructions::$name).then_some(Self(()))
            }
        }
    };
}

token!(Avx2);
token!(Avx512);
token!(Avx512Bf16);
#[cfg(target_os = "linux")]
token!(Amx);

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    /// Asks the operating system for the registers. It saves them only for processes that ask.
    pub(super) fn is_available() -> bool {
        use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        const TILE_STATE: u64 = 0b11 << 17;
        const OSXSAVE: u32 = 1 << 27;
        #[target_feature(enable = "xsave")]
        fn enabled_state() -> u64 {
            // SAFETY: called only where the system has enabled xgetbv.
            unsafe { _xgetbv(0) }
        }
        if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
            return false;
        }
        let features = __cpuid_count(7, 0).edx;
        // SAFETY: OSXSAVE shows that the processor has the instruction and that the system allows
        // it.
        let state = unsafe { enabled_state() };
        let has = features & AMX_BF16 != 0 && features & AMX_TILE != 0;
        has && state & TILE_STATE == TILE_STATE && is_permitted()
    }

    fn is_permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // SAFETY: the request passes two numbers and changes only the permission.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
    }
}
