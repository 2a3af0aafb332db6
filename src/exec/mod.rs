//! Execution: sessions, persistent state, the step loop.

mod awake;
mod carve;
mod frozen;
mod parts;
mod precision;
pub mod reference;
mod run;
mod session;
mod store;

pub use parts::Part;
pub use precision::{OptimizerState, Precision};
pub use run::Profile;
pub use session::{Options, Program, SMALL_PARAMETER, Session, Usage, bind, infer};
pub use store::{Purpose, Store};
