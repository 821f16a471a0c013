//! Which instructions the kernels use: the widest that the processor has.

use std::{fmt, sync::OnceLock};

use serde::{Deserialize, Serialize};

/// Sets of vector instructions; each holds those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Instructions {
    /// What every processor of the architecture has.
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

impl Instructions {
    /// What the kernels of this process use.
    pub fn in_use() -> Self {
        *IN_USE.get_or_init(Self::best)
    }

    /// Uses at most these from now on, for measurements and tests. Without effect after the first
    /// kernel has run.
    pub fn limit(self) {
        IN_USE.get_or_init(|| self.min(Self::best()));
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
            // Without AMX, as in some virtual machines: their products of bf16 take half again as
            // long as those of f32, AMD's half as long.
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
use super::tile::amx::is_available as has_amx;

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
