//! The options of the training methods: what a config's `icp-…` and `byot-…` keys mean.

use crate::error::Result;
use crate::exec::Precision;
use crate::icp::{
    Alpha, Ball, Byot, ByotSettings, Direction, Features, Icp, Place, Reuse, Settings, Taps, Which,
};
use crate::train::method::{Method, Plain};
use crate::train::optimizer::Optimizer;

use super::config::{Config, MethodName, NumberOr, PerturberName, config};

fn names(list: &str) -> Vec<String> {
    list.split(',').map(|n| n.trim().to_string()).collect()
}

/// The number behind `prefix:`, if the text is of that form.
fn number_after(text: &str, prefix: &str) -> Option<f64> {
    text.strip_prefix(prefix)?.strip_prefix(':')?.trim().parse().ok()
}

impl Config {
    /// The method that the weights learn by; `unlabelled`: some samples have no label.
    pub fn training_method(&self, unlabelled: bool) -> Result<Box<dyn Method>> {
        let compared = self.method == MethodName::Icp && self.icp_features != Features::None;
        if unlabelled && !compared && self.unlabelled_entropy == 0.0 {
            return config(
                "samples without a label (-1, or --unlabelled) take part in ICP's feature term and in \
                 --unlabelled-entropy alone: leave them out, use --method icp with --icp-features, or give that a weight",
            );
        }
        Ok(match self.method {
            MethodName::Supervised => Box::new(Plain::default()),
            MethodName::Icp => Box::new(Icp::new(Settings { unlabelled, ..self.icp_settings()? })),
            MethodName::Byot => Box::new(Byot::new(ByotSettings {
                alpha: self.byot_alpha,
                temperature: self.byot_temperature,
                taps: self.taps()?,
                seed: self.seed,
            })),
        })
    }

    /// ICP with these options.
    pub fn icp(&self) -> Result<Icp> {
        Ok(Icp::new(self.icp_settings()?))
    }

    pub fn icp_settings(&self) -> Result<Settings> {
        Ok(Settings {
            // The perturber is plain: momentum and weight decay are the weights' optimizer's.
            perturber: match self.icp_perturber {
                PerturberName::Sgd | PerturberName::Sign => Optimizer::sgd(),
                PerturberName::Adam => Optimizer::adam(0.0, false),
                PerturberName::Ademamix => Optimizer::ademamix(0.0),
            },
            sign: self.icp_perturber == PerturberName::Sign,
            direction: self.icp_direction,
            steps: self.icp_steps,
            epsilon: self.icp_epsilon,
            unit: self.icp_unit,
            ball: self.ball()?,
            range: self.range()?,
            which: self.which()?,
            reuse: self.icp_reuse,
            place: match self.icp_at.as_str() {
                "auto" => Place::Auto,
                "first" => Place::First,
                list => Place::Names(names(list)),
            },
            warmup: self.icp_warmup,
            alpha: self.alpha()?,
            floor: self.icp_alpha_floor,
            features: self.icp_features,
            weights: self.icp_weights,
            taps: self.taps()?,
            ema: Some(self.icp_ema).filter(|d| *d > 0.0),
            unlabelled: false,
        })
    }

    /// Refuses what makes no sense of the methods' options, whichever method is chosen.
    pub(super) fn check_methods(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.icp_warmup) {
            return config(format!("--icp-warmup {}: is a share of the epochs, 0 to 1", self.icp_warmup));
        }
        if !(0.0..=1.0).contains(&self.icp_alpha_floor) {
            return config(format!("--icp-alpha-floor {}: must be from 0 to 1", self.icp_alpha_floor));
        }
        if !(0.0..1.0).contains(&self.icp_ema) {
            return config(format!("--icp-ema {}: a decay is from 0 (off) to below 1", self.icp_ema));
        }
        if !(0.0..=1.0).contains(&self.byot_alpha) {
            return config(format!("--byot-alpha {}: must be from 0 to 1", self.byot_alpha));
        }
        if !(self.byot_temperature.is_finite() && self.byot_temperature > 0.0) {
            return config(format!("--byot-temperature {}: must be above 0", self.byot_temperature));
        }
        self.icp_settings()?;
        if self.method != MethodName::Icp {
            return Ok(());
        }
        if self.icp_reuse != Reuse::Fresh && !self.images.augmentation().is_none() {
            return config(
                "--icp-reuse keeps a perturbation a sample, and shift, flip, rotate and crop move the sample away under \
                 it: leave out the one or the other",
            );
        }
        if self.icp_reuse == Reuse::Free && self.precision == Precision::F16 {
            return config("--icp-reuse free keeps gradients, which --precision f16 scales: take bf16");
        }
        if self.icp_reuse == Reuse::Warm && self.icp_direction == Direction::None {
            return config("--icp-reuse warm needs a perturbation: --icp-direction none has none");
        }
        Ok(())
    }

    fn alpha(&self) -> Result<Alpha> {
        let number = match &self.icp_alpha {
            NumberOr::Number(x) => Some(*x),
            NumberOr::Word(w) => w.parse().ok(),
        };
        match (&self.icp_alpha, number) {
            (_, Some(a)) if (0.0..=1.0).contains(&a) => Ok(Alpha::Fixed(a)),
            (NumberOr::Word(w), None) if w == "schedule" => Ok(Alpha::Schedule),
            (NumberOr::Word(w), None) if w == "per-step" => Ok(Alpha::PerStep),
            _ => config("--icp-alpha takes `schedule`, `per-step` or a number from 0 to 1"),
        }
    }

    fn taps(&self) -> Result<Taps> {
        let text = self.icp_taps.as_str();
        for (prefix, taps) in [("first:", Taps::First as fn(usize) -> Taps), ("last:", Taps::Last)] {
            if let Some(n) = text.strip_prefix(prefix) {
                return match n.parse() {
                    Ok(n) if n > 0 => Ok(taps(n)),
                    _ => config(format!("--icp-taps {text}: takes a number of taps from 1")),
                };
            }
        }
        Ok(if text == "auto" { Taps::Auto } else { Taps::Names(names(text)) })
    }

    fn ball(&self) -> Result<Option<Ball>> {
        let text = self.icp_ball.as_str();
        let ball = match (number_after(text, "linf"), number_after(text, "l2")) {
            _ if text == "none" => return Ok(None),
            (Some(r), _) if r.is_finite() && r > 0.0 => Ball::Linf(r),
            (_, Some(r)) if r.is_finite() && r > 0.0 => Ball::L2(r),
            _ => return config(format!("--icp-ball {text}: takes none, linf:RADIUS or l2:RADIUS, above 0")),
        };
        Ok(Some(ball))
    }

    fn range(&self) -> Result<Option<(f64, f64)>> {
        let text = self.icp_range.as_str();
        if text == "none" {
            return Ok(None);
        }
        let ends =
            text.split_once(':').and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
        match ends {
            Some((low, high)) if low < high => Ok(Some((low, high))),
            _ => config(format!("--icp-range {text}: takes none or LOW:HIGH, such as 0:1")),
        }
    }

    fn which(&self) -> Result<Which> {
        match (self.icp_which.as_str(), number_after(&self.icp_which, "uncertain")) {
            ("all", _) => Ok(Which::All),
            ("wrong", _) => Ok(Which::Wrong),
            (_, Some(p)) if p > 0.0 && p <= 1.0 => Ok(Which::Uncertain(p)),
            (text, _) => {
                config(format!("--icp-which {text}: takes all, wrong or uncertain:P with P above 0, to 1"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(f: fn(&mut Config)) -> Config {
        let mut c = Config::default();
        f(&mut c);
        c
    }

    #[test]
    fn words_become_settings() {
        let s = with(|c| {
            c.icp_ball = "l2:1.5".into();
            c.icp_range = "-1:1".into();
            c.icp_which = "uncertain:0.9".into();
            c.icp_taps = "last:2".into();
            c.icp_at = "a, b".into();
            c.icp_perturber = PerturberName::Sign;
            c.icp_ema = 0.99;
        });
        let s = s.icp_settings().unwrap();
        assert_eq!((s.ball, s.range), (Some(Ball::L2(1.5)), Some((-1.0, 1.0))));
        assert_eq!((s.which, s.taps), (Which::Uncertain(0.9), Taps::Last(2)));
        assert_eq!(s.place, Place::Names(vec!["a".into(), "b".into()]));
        assert!(s.sign && s.perturber == Optimizer::sgd() && s.ema == Some(0.99));
        let plain = Config::default().icp_settings().unwrap();
        assert_eq!((plain.ball, plain.range, plain.which), (None, None, Which::All));
        let off = with(|c| c.icp_ema = 0.0).icp_settings().unwrap();
        assert_eq!((plain.ema, off.ema), (Some(0.95), None));
    }

    #[test]
    fn refuses_what_makes_no_sense() {
        let bad = |f: fn(&mut Config)| with(f).check().unwrap_err().to_string();
        assert!(bad(|c| c.icp_ball = "l3:1".into()).contains("--icp-ball"));
        assert!(bad(|c| c.icp_ball = "linf:-1".into()).contains("--icp-ball"));
        assert!(bad(|c| c.icp_range = "1:0".into()).contains("--icp-range"));
        assert!(bad(|c| c.icp_which = "some".into()).contains("--icp-which"));
        assert!(bad(|c| c.icp_taps = "first:0".into()).contains("--icp-taps"));
        assert!(bad(|c| c.icp_ema = 1.0).contains("--icp-ema"));
        assert!(bad(|c| c.icp_alpha_floor = -0.1).contains("--icp-alpha-floor"));
        assert!(bad(|c| c.byot_temperature = 0.0).contains("--byot-temperature"));
        let moved = |c: &mut Config| {
            c.icp_reuse = Reuse::Warm;
            c.images.shift = 2;
        };
        assert!(bad(moved).contains("--icp-reuse"));
    }
}
