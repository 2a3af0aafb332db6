//! What came of cells: a file of one JSON document a line, to which lines are only added.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::train::metrics::Metrics;

/// What came of a cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub cell: String,
    /// Of all that decides the result; a record of another is not this cell's.
    pub fingerprint: String,
    pub point: Vec<(String, String)>,
    pub arm: String,
    pub seed: u64,
    /// On the samples to measure on: before, loss and accuracy; and after.
    pub before: Metrics,
    pub after: Metrics,
    /// Other measures of the network after.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub measures: BTreeMap<String, f64>,
    pub steps: usize,
    pub skipped_steps: usize,
    pub seconds: f64,
    /// The median step, in milliseconds.
    pub step_ms: f64,
    pub threads: usize,
    /// Instruction set level, on which the last bits depend.
    pub isa: String,
}

/// The records of a study, in a file.
pub struct Records {
    path: PathBuf,
    file: File,
    all: Vec<Record>,
}

impl Records {
    /// Opens (or makes) the file. A last line that a crash cut short is removed; any other line that is no record is an
    /// error.
    pub fn open(path: &Path) -> Result<Records> {
        let fail = |e| Error::io(path, e);
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(fail)?;
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(fail)?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(fail)?;
        let whole = text.rfind('\n').map_or(0, |i| i + 1);
        let mut all = Vec::new();
        for (i, line) in text[..whole].lines().enumerate().filter(|l| !l.1.trim().is_empty()) {
            all.push(
                serde_json::from_str(line)
                    .map_err(|e| Error::file(path, format!("line {} is no record: {e}", i + 1)))?,
            );
        }
        if whole < text.len() {
            file.set_len(whole as u64).map_err(fail)?;
        }
        file.seek(SeekFrom::End(0)).map_err(fail)?;
        Ok(Records { path: path.to_path_buf(), file, all })
    }

    /// The last record of a cell with this fingerprint.
    pub fn find(&self, cell: &str, fingerprint: &str) -> Option<&Record> {
        self.all.iter().rev().find(|r| r.cell == cell && r.fingerprint == fingerprint)
    }

    /// Adds a record in one write, and waits until it is on the disk.
    pub fn add(&mut self, record: Record) -> Result<()> {
        let fail = |e| Error::io(&self.path, e);
        let mut line = serde_json::to_string(&record).map_err(|e| Error::file(&self.path, e.to_string()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(fail)?;
        self.file.sync_data().map_err(fail)?;
        self.all.push(record);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(cell: &str, accuracy: f64) -> Record {
        Record {
            cell: cell.into(),
            fingerprint: "f".into(),
            point: vec![("labels".into(), "10".into())],
            arm: "plain".into(),
            seed: 0,
            before: Metrics::default(),
            after: Metrics { accuracy: Some(accuracy), ..Metrics::default() },
            measures: BTreeMap::from([("ssim".into(), 0.1)]),
            steps: 1,
            skipped_steps: 0,
            seconds: 1.0,
            step_ms: 1.0,
            threads: 1,
            isa: "portable".into(),
        }
    }

    #[test]
    fn a_line_cut_short_is_dropped_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r/results.jsonl");
        let third = 1.0 / 3.0;
        {
            let mut r = Records::open(&path).unwrap();
            r.add(record("a", third)).unwrap();
            r.add(record("b", 0.5)).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 20]).unwrap();
        let mut r = Records::open(&path).unwrap();
        // Every bit of a number comes back.
        assert_eq!(r.find("a", "f").unwrap().after.accuracy, Some(third));
        assert!(r.find("b", "f").is_none() && r.find("a", "g").is_none());
        r.add(record("b", 0.75)).unwrap();
        let r = Records::open(&path).unwrap();
        assert_eq!(r.find("b", "f"), Some(&record("b", 0.75)));
        std::fs::write(&path, "{}\n").unwrap();
        assert!(Records::open(&path).is_err());
    }
}
