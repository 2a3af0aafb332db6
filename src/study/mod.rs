//! Studies: a grid of finetunes from one file, each cell of it one run, with tables of paired differences.
//!
//! ```text
//! CONFIG.toml ─Study→ cells (axis points × arms × seeds) ─Runner→ records, one JSON line a cell ─Table→ pages
//! ```
//!
//! A cell's result is a function of the file and its seed alone; what is recorded is not run again.

mod config;
pub mod images;
mod record;
mod run;
pub mod stats;
mod table;

pub use config::{Cell, Study};
pub use record::{Record, Records};
pub use run::Runner;
pub use table::{Block, Row, Table};
