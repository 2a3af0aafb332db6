//! The loop of a block: its instructions for each number of squares.
//!
//! Two threads that share a processor take turns to begin instructions, and one that has nothing but those of the matrix registers
//! gets by far the fewer turns: beside a busy neighbour a block was multiplied at 570 GFLOP/s, and at 1,000 with eight others behind
//! each of them. On a processor to itself they fit into the time that a product takes anyway. Most of them do nothing; some fetch
//! what the next block will write.

use super::{Block, Runs};

/// Eight instructions between those of the registers: that do nothing, or fetch some rows on the way.
macro_rules! between {
    (time) => {
        "\n.fill 8, 1, 0x90"
    };
    (wide) => {
        "\nprefetcht1 [{f}]\nprefetcht1 [{f} + 64]\nadd {f}, [{block} + {ahead_row}]\n.fill 5, 1, 0x90"
    };
    (narrow) => {
        "\nprefetcht1 [{f}]\nadd {f}, [{block} + {ahead_row}]\
         \nprefetcht1 [{f}]\nadd {f}, [{block} + {ahead_row}]\
         \nprefetcht1 [{f}]\nadd {f}, [{block} + {ahead_row}]\n.fill 2, 1, 0x90"
    };
}

/// A square of A from the row that a pointer points to, or the `$at`th of B's columns, to register `$to`; or a product of two
/// registers that is added to a third, and what is fetched then.
macro_rules! instruction {
    ($fetched:ident, (a $to:literal $row:ident)) => {
        concat!("tileloadd tmm", $to, ", [{", stringify!($row), "} + {a_row}]", between!(time))
    };
    ($fetched:ident, (b $to:literal $at:literal)) => {
        concat!("tileloadd tmm", $to, ", [{b} + {b_row} + 64 * ", $at, "]", between!(time))
    };
    ($fetched:ident, (product $sum:literal $a:literal $b:literal)) => {
        concat!("tdpbf16ps tmm", $sum, ", tmm", $a, ", tmm", $b, between!($fetched))
    };
}

/// Where the sums of register `$sum` go: to the place that a pointer points to, the `$at`th square of columns there.
macro_rules! sum {
    (load $sum:literal $row:ident $at:literal) => {
        concat!("tileloadd tmm", $sum, ", [{", stringify!($row), "} + {n} + 64 * ", $at, "]")
    };
    (store $sum:literal $row:ident $at:literal) => {
        concat!("tilestored [{", stringify!($row), "} + {n} + 64 * ", $at, "], tmm", $sum)
    };
}

/// The loops over runs and over their steps: pointers to squares of rows, a step's instructions, and where the sums go.
macro_rules! block {
    (
        $runs:ident, $block:ident, [$($row:ident $nth:literal),*], [$($step:tt),*],
        [$($sum:literal $to:ident $at:literal),*], $fetched:ident
    ) => {
        std::arch::asm!(
            "cmp byte ptr [{block} + {add}], 0",
            "jne 5f",
            $(concat!("tilezero tmm", $sum),)*
            "jmp 6f",
            "5:",
            $(concat!("mov {", stringify!($row), "}, [{block} + {to} + 8 * ", $nth, "]"),)*
            "mov {n}, [{block} + {to_row}]",
            "shl {n}, 2",
            $(sum!(load $sum $to $at),)*
            "6:",
            "mov {f}, [{block} + {ahead}]",
            "mov {n}, [{run} + 8]",
            "test {n}, {n}",
            "jz 4f",
            "2:",
            $(concat!("mov {", stringify!($row), "}, [{block} + {a} + 8 * ", $nth, "]"),)*
            "mov {n}, [{run}]",
            $(concat!("add {", stringify!($row), "}, {n}"),)*
            "add {b}, [{run} + 16]",
            "mov {n}, [{run} + 8]",
            "3:",
            $(instruction!($fetched, $step),)*
            $(concat!("add {", stringify!($row), "}, {a_step}"),)*
            "add {b}, {b_step}",
            "dec {n}",
            "jnz 3b",
            "add {run}, 24",
            "cmp qword ptr [{run} + 8], 0",
            "jne 2b",
            "4:",
            $(concat!("mov {", stringify!($row), "}, [{block} + {to} + 8 * ", $nth, "]"),)*
            "mov {n}, [{block} + {to_row}]",
            "shl {n}, 2",
            $(sum!(store $sum $to $at),)*
            run = inout(reg) $runs.runs.as_ptr() => _,
            n = out(reg) _,
            f = out(reg) _,
            $($row = out(reg) _,)*
            a_row = in(reg) 4 * $block.a_row,
            a_step = in(reg) 4 * $runs.steps,
            b = inout(reg) $block.b => _,
            b_row = in(reg) 4 * $block.b_row,
            b_step = in(reg) 4 * $runs.steps * $block.b_row,
            block = in(reg) $block as *const Block,
            a = const std::mem::offset_of!(Block, a),
            to = const std::mem::offset_of!(Block, place.to),
            to_row = const std::mem::offset_of!(Block, place.row),
            add = const std::mem::offset_of!(Block, place.add),
            ahead = const std::mem::offset_of!(Block, ahead.from),
            ahead_row = const std::mem::offset_of!(Block, ahead.row),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// # Safety
/// As of [`Registers::multiply`](super::Registers::multiply); the registers must be set up.
#[inline]
#[rustfmt::skip] // Registers and what they hold, one square or sum an item.
pub(super) unsafe fn multiply(runs: &Runs, block: &Block) {
    // SAFETY: reads what the caller promises, and the runs up to the empty one; writes the block's squares of the sums.
    unsafe {
        match (block.rows, block.columns) {
            (1, 1) => block!(
                runs, block, [p 0],
                [(a 4 p), (b 6 0), (product 0 4 6)],
                [0 p 0], narrow
            ),
            (1, 2) => block!(
                runs, block, [p 0],
                [(a 4 p), (b 6 0), (b 7 1), (product 0 4 6), (product 1 4 7)],
                [0 p 0, 1 p 1], wide
            ),
            (1, 3) => block!(
                runs, block, [p 0],
                [(a 4 p), (b 6 0), (b 7 1), (product 0 4 6), (b 6 2), (product 1 4 7), (product 2 4 6)],
                [0 p 0, 1 p 1, 2 p 2], wide
            ),
            (1, _) => block!(
                runs, block, [p 0],
                [(a 4 p), (b 6 0), (b 7 1), (product 0 4 6), (b 6 2), (product 1 4 7), (b 7 3), (product 2 4 6), (product 3 4 7)],
                [0 p 0, 1 p 1, 2 p 2, 3 p 3], wide
            ),
            (2, 1) => block!(
                runs, block, [p 0, q 1],
                [(b 6 0), (a 4 p), (a 5 q), (product 0 4 6), (product 1 5 6)],
                [0 p 0, 1 q 0], narrow
            ),
            (3, _) => block!(
                runs, block, [p 0, q 1, r 2],
                [(b 6 0), (a 4 p), (a 5 q), (product 0 4 6), (a 4 r), (product 1 5 6), (product 2 4 6)],
                [0 p 0, 1 q 0, 2 r 0], narrow
            ),
            (4, _) => block!(
                runs, block, [p 0, q 1, r 2, s 3],
                [(b 6 0), (a 4 p), (a 5 q), (product 0 4 6), (a 4 r), (product 1 5 6), (a 5 s), (product 2 4 6), (product 3 5 6)],
                [0 p 0, 1 q 0, 2 r 0, 3 s 0], narrow
            ),
            _ => block!(
                runs, block, [p 0, q 1],
                [(a 4 p), (b 6 0), (b 7 1), (a 5 q), (product 0 4 6), (product 1 4 7), (product 2 5 6), (product 3 5 7)],
                [0 p 0, 1 p 1, 2 q 0, 3 q 1], wide
            ),
        }
    }
}
