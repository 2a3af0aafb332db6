//! What the memory of a plan is used for.

use serde::Serialize;

use crate::plan::{Block, aligned};

/// What a run of bytes is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Activation,
    Gradient,
    Scratch,
}

/// The arena at the moment it is fullest, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Peak {
    pub activations: usize,
    pub gradients: usize,
    pub scratch: usize,
    /// Gaps that the layout could not fill.
    pub fragmentation: usize,
    /// The arena: the sum of the above.
    pub arena: usize,
}

impl Peak {
    /// Of blocks with offsets, over steps `0..=end`.
    pub fn of(blocks: &[Block], arena: usize, end: usize) -> Self {
        let mut change = vec![(0i64, 0i64, 0i64); end + 2];
        for b in blocks {
            let bytes = aligned(b.bytes) as i64;
            let (born, dies) = (b.born.min(end), b.dies.min(end));
            for (at, sign) in [(born, 1), (dies + 1, -1)] {
                match b.kind {
                    Kind::Activation => change[at].0 += sign * bytes,
                    Kind::Gradient => change[at].1 += sign * bytes,
                    Kind::Scratch => change[at].2 += sign * bytes,
                }
            }
        }
        let (mut live, mut best) = ((0, 0, 0), (0, 0, 0));
        for c in &change {
            live = (live.0 + c.0, live.1 + c.1, live.2 + c.2);
            if live.0 + live.1 + live.2 > best.0 + best.1 + best.2 {
                best = live;
            }
        }
        Peak {
            activations: best.0 as usize,
            gradients: best.1 as usize,
            scratch: best.2 as usize,
            fragmentation: arena - (best.0 + best.1 + best.2) as usize,
            arena,
        }
    }
}
