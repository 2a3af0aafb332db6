//! Execution: sessions, persistent state, the step loop.

mod awake;
mod carve;
mod parts;
pub mod reference;
mod run;
mod session;
mod store;

pub use parts::Part;
pub use run::Profile;
pub use session::{Options, Program, Session, Usage, bind, infer};
pub use store::{Purpose, Store};
