//! Execution: sessions, persistent state, the step loop.

mod awake;
mod carve;
mod forward;
mod frozen;
mod parts;
mod pieces;
mod precision;
pub mod reference;
mod run;
mod session;
mod store;

pub use forward::{bind, infer};
pub use parts::Part;
pub use precision::{OptimizerState, Precision};
pub use run::Profile;
pub use session::{Options, Program, SMALL_PARAMETER, Session, Usage};
pub use store::{Purpose, Store};
