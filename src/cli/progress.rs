//! Progress of a training run: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::train::fit::Progress;

/// Seconds between lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows training steps on stderr.
pub struct Reporter {
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    loss: f64,
}

impl Reporter {
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:32} {pos}/{len}  {msg}  ETA {eta}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Reporter { bar, last_line: None, loss: f64::NAN }
    }

    pub fn step(&mut self, p: &Progress) {
        // Smoothed over about ten steps: single batches jump.
        self.loss = if self.loss.is_finite() { 0.9 * self.loss + 0.1 * p.loss } else { p.loss };
        let features = p.features.map(|f| format!("  features {f:.4}")).unwrap_or_default();
        let accuracy = p.accuracy.map(|a| format!("  accuracy {a:.3}")).unwrap_or_default();
        let text = format!(
            "epoch {}/{}  loss {:.4}{features}{accuracy}  {:.0} samples/s",
            p.epoch + 1,
            p.epochs,
            self.loss,
            p.samples_per_second
        );
        if let Some(bar) = &self.bar {
            bar.set_length(p.steps as u64);
            bar.set_position(p.step as u64);
            bar.set_message(text);
            if p.step == p.steps {
                bar.finish_and_clear();
            }
            return;
        }
        let due = self.last_line.is_none_or(|t| t.elapsed() >= LINE_EVERY);
        if due || p.step == p.steps {
            eprintln!("step {}/{}  {text}", p.step, p.steps);
            self.last_line = Some(Instant::now());
        }
    }
}
