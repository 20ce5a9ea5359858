//! Which chip a name means, and what that chip offers to everything. Limits of single operators stand with the operators.

use std::fmt;

/// A family of chips with one set of operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Chip {
    /// 910B: Atlas 800I A2, 800T A2, 300I A2.
    A2,
    /// 910C: Atlas 800I A3.
    A3,
    /// 310P: Atlas 300I Duo, 300I Pro. No bf16 in any operator, no fused attention; experimental.
    P310,
}

impl Chip {
    /// The chip that the runtime's name means; `None` for one that nothing is known of. `Ascend910B` with no digit behind
    /// it is the old 910A family.
    pub fn from_soc_name(name: &str) -> Option<Self> {
        let digit_behind =
            |prefix: &str| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        if name.starts_with("Ascend910_93") {
            Some(Chip::A3)
        } else if digit_behind("Ascend910B") {
            Some(Chip::A2)
        } else if digit_behind("Ascend310P") {
            Some(Chip::P310)
        } else {
            None
        }
    }

    /// Whether operators take bf16.
    pub fn has_bf16(self) -> bool {
        self != Chip::P310
    }
}

impl fmt::Display for Chip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Chip::A2 => "A2",
            Chip::A3 => "A3",
            Chip::P310 => "310P",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similar_names_of_different_machines_are_told_apart() {
        for (name, chip) in [
            ("Ascend910B3", Some(Chip::A2)),
            ("Ascend910B4-1", Some(Chip::A2)),
            ("Ascend910B2C", Some(Chip::A2)),
            ("Ascend910_9391", Some(Chip::A3)),
            ("Ascend310P3", Some(Chip::P310)),
            ("Ascend910B", None),
            ("Ascend910ProB", None),
            ("Ascend310B1", None),
            ("Ascend950PR", None),
            ("", None),
        ] {
            assert_eq!(Chip::from_soc_name(name), chip, "{name}");
        }
    }
}
