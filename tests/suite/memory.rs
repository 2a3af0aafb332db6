//! `retune plan` against what a run really takes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::{json, retune, shipped, text};

/// Anonymous resident memory of a process in bytes.
fn rss_anon(pid: u32) -> Option<usize> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|l| l.starts_with("RssAnon:"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kb| kb * 1024)
}

/// Peak of anonymous memory of a run of the binary, sampled every millisecond.
pub fn peak(args: &[&str]) -> usize {
    let mut child = retune()
        .args(args)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        peak = peak.max(rss_anon(child.id()).unwrap_or(0));
        std::thread::sleep(Duration::from_millis(1));
    }
    peak
}

/// What a process has at its start. It is over so soon that one run may end between two samples.
pub fn start() -> usize {
    (0..8).map(|_| peak(&["bench", "--help"])).max().unwrap()
}

#[test]
fn the_plan_is_what_the_run_takes() {
    if !Path::new("/proc/self/status").exists() {
        println!("skipped: no /proc here");
        return;
    }
    let model: PathBuf = shipped("models/resnet20.onnx");
    let plan = json(&["plan", text(&model), "--batch", "32", "--json"], 0);
    for (mode, bench) in [("supervised", "train"), ("icp", "icp")] {
        let planned = plan["modes"].as_array().unwrap().iter().find(|m| m["mode"] == mode).unwrap();
        let predicted = planned["peak_bytes"].as_u64().unwrap() as usize;
        let base = ["bench", text(&model), "--batch", "32", "--threads", "1", "--runs", "3", "--mode", bench];
        let measured = json(&[&base[..], &["--json"]].concat(), 0);
        // The arena's peak exactly.
        assert_eq!(measured["memory"]["arena"], planned["memory"]["arena"], "{mode}: arena");
        assert_eq!(
            measured["peak_bytes"].as_u64().unwrap() as usize,
            predicted,
            "{mode}: what the session holds"
        );
        // And the process, above what it has at its start.
        let above = peak(&base).saturating_sub(start());
        let ratio = above as f64 / predicted as f64;
        println!("{mode}: planned {predicted}, process {above} above its start: {ratio:.3}");
        assert!(
            (0.85..=1.15).contains(&ratio),
            "{mode}: planned {predicted} bytes, the process took {above}"
        );
    }
}
