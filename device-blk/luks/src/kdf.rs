//! From passphrases to keys, at a bounded cost.

use argon2::{Algorithm, Argon2, Params, Version};
use zeroize::Zeroizing;

use crate::error::LuksError;
use crate::hash::Hash;

/// What unlocking may cost. A header that asks for more is refused before anything is derived.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Memory that Argon2 may use, in KiB.
    pub max_memory_kib: u32,
    /// Work of all key slots that are tried: iterations of PBKDF2, and KiB that Argon2 fills. Both
    /// take a processor about a microsecond.
    pub max_work: u64,
}

impl Default for Limits {
    /// What `cryptsetup` uses at most without being told otherwise (1 GiB), and about two minutes.
    fn default() -> Self {
        Self {
            max_memory_kib: 1 << 20,
            max_work: 120_000_000,
        }
    }
}

/// How a key is derived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kdf {
    Pbkdf2 { hash: Hash, iterations: u32 },
    Argon2 { variant: Argon2Variant, cost: Cost },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Argon2Variant {
    I,
    Id,
}

/// Argon2's parameters (RFC 9106, section 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cost {
    pub(crate) memory_kib: u32,
    pub(crate) passes: u32,
    pub(crate) lanes: u32,
}

/// Lanes that `cryptsetup` makes at most.
const MAX_LANES: u32 = 4;

impl Kdf {
    fn work(&self) -> u64 {
        match self {
            Self::Pbkdf2 { iterations, .. } => u64::from(*iterations),
            Self::Argon2 { cost, .. } => u64::from(cost.memory_kib) * u64::from(cost.passes),
        }
    }

    /// A key of `key_bytes`, paid for from `budget`.
    ///
    /// # Errors
    /// The budget does not suffice, the parameters are impossible, or there is no memory.
    pub(crate) fn derive(
        &self,
        passphrase: &[u8],
        salt: &[u8],
        key_bytes: usize,
        budget: &mut Budget,
    ) -> Result<Zeroizing<Vec<u8>>, LuksError> {
        budget.spend(self)?;
        let mut key = Zeroizing::new(vec![0; key_bytes]);
        match self {
            Self::Pbkdf2 { hash, iterations } => {
                hash.pbkdf2(passphrase, salt, *iterations, &mut key);
            }
            Self::Argon2 { variant, cost } => {
                let algorithm = match variant {
                    Argon2Variant::I => Algorithm::Argon2i,
                    Argon2Variant::Id => Algorithm::Argon2id,
                };
                let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(key_bytes))
                    .map_err(|error| impossible(&error))?;
                Argon2::new(algorithm, Version::V0x13, params)
                    .hash_password_into(passphrase, salt, &mut key)
                    .map_err(|error| impossible(&error))?;
            }
        }
        Ok(key)
    }
}

fn impossible(error: &argon2::Error) -> LuksError {
    LuksError::malformed(format!("a key slot's Argon2 parameters: {error}"))
}

/// What is left of [`Limits`].
pub(crate) struct Budget {
    limits: Limits,
    work_left: u64,
}

impl Budget {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            work_left: limits.max_work,
        }
    }

    fn spend(&mut self, kdf: &Kdf) -> Result<(), LuksError> {
        if let Kdf::Argon2 { cost, .. } = kdf {
            if cost.memory_kib > self.limits.max_memory_kib {
                return Err(LuksError::TooExpensive {
                    what: format!("{} KiB of memory for Argon2", cost.memory_kib),
                    limit: format!("{} KiB", self.limits.max_memory_kib),
                });
            }
            if cost.lanes > MAX_LANES {
                return Err(LuksError::TooExpensive {
                    what: format!("{} lanes of Argon2", cost.lanes),
                    limit: format!("{MAX_LANES} lanes"),
                });
            }
        }
        match self.work_left.checked_sub(kdf.work()) {
            Some(left) => {
                self.work_left = left;
                Ok(())
            }
            None => Err(LuksError::TooExpensive {
                what: format!("{} steps of key derivation", kdf.work()),
                limit: format!("{} steps for all key slots", self.limits.max_work),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argon2(memory_kib: u32, passes: u32, lanes: u32) -> Kdf {
        Kdf::Argon2 {
            variant: Argon2Variant::Id,
            cost: Cost {
                memory_kib,
                passes,
                lanes,
            },
        }
    }

    #[test]
    fn hostile_costs_are_refused_before_anything_is_allocated() {
        let mut budget = Budget::new(Limits::default());
        for kdf in [
            argon2(u32::MAX, 1, 1),
            argon2(1 << 20, u32::MAX, 1),
            argon2(1 << 10, 1, 1 << 20),
            Kdf::Pbkdf2 {
                hash: Hash::Sha256,
                iterations: u32::MAX,
            },
        ] {
            let error = kdf.derive(b"x", &[0; 32], 64, &mut budget).unwrap_err();
            assert!(matches!(error, LuksError::TooExpensive { .. }), "{error}");
        }
    }

    #[test]
    fn work_of_all_slots_together_is_bounded() {
        let mut budget = Budget::new(Limits {
            max_memory_kib: 64,
            max_work: 3000,
        });
        let kdf = Kdf::Pbkdf2 {
            hash: Hash::Sha256,
            iterations: 1000,
        };
        for _ in 0..3 {
            kdf.derive(b"x", &[0; 32], 64, &mut budget).unwrap();
        }
        assert!(kdf.derive(b"x", &[0; 32], 64, &mut budget).is_err());
    }

    #[test]
    fn impossible_parameters_are_an_error() {
        let mut budget = Budget::new(Limits::default());
        for kdf in [argon2(0, 1, 1), argon2(64, 0, 1), argon2(64, 1, 0)] {
            let error = kdf.derive(b"x", &[0; 32], 64, &mut budget).unwrap_err();
            assert!(matches!(error, LuksError::Malformed { .. }), "{error}");
        }
    }
}
