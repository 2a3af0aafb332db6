//! The file of a study.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::error::{Error, Result};
use crate::finetune::{Config, NumberOr};
use crate::train::data::Worn;

/// More cells than this are a mistake.
const MOST_CELLS: usize = 100_000;

/// The file as it is written.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    title: String,
    #[serde(default)]
    about: String,
    /// The arm that others are compared with.
    baseline: String,
    /// Further arms that others are compared with.
    #[serde(default)]
    controls: Vec<String>,
    seeds: Seeds,
    /// Options of every cell: those of `finetune`, and those of [`Task`].
    base: Table,
    #[serde(default)]
    axis: Vec<Axis>,
    arm: Vec<Arm>,
    #[serde(default)]
    quick: Quick,
}

/// So many seeds from 0, or these.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Seeds {
    Number(u64),
    List(Vec<u64>),
}

impl Seeds {
    fn list(&self) -> Vec<u64> {
        match self {
            Seeds::Number(n) => (0..*n).collect(),
            Seeds::List(list) => list.clone(),
        }
    }
}

/// What all arms are run under in turn, and compared within: `key` with each of `values`, or named points.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Axis {
    name: String,
    key: Option<String>,
    #[serde(default)]
    values: Vec<Value>,
    #[serde(default)]
    point: Vec<Named>,
}

/// A name and options.
#[derive(Debug, Clone, Deserialize)]
struct Named {
    name: String,
    #[serde(flatten)]
    options: Table,
}

/// What is compared. With a `grid` it stands for one arm a combination of the grid's values.
#[derive(Debug, Clone, Deserialize)]
struct Arm {
    name: String,
    #[serde(default)]
    grid: Table,
    #[serde(flatten)]
    options: Table,
}

/// What is different in a quick run.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Quick {
    seeds: Option<Seeds>,
    /// The arms to run, by their name in the file; all others are left out.
    arms: Option<Vec<String>>,
    /// Of axes by name, the points to run.
    #[serde(default)]
    axes: BTreeMap<String, Vec<Value>>,
    /// Options over all others.
    #[serde(default)]
    options: Table,
}

/// What a cell trains on and is measured on: the options of a study that `finetune` does not have. Paths are relative to
/// the study's file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Task {
    pub model: PathBuf,
    pub data: PathBuf,
    /// Samples of the data to measure on, the same in every cell; or other data, by path.
    pub test: NumberOr,
    /// Samples to train on, chosen by the seed, of each class as many as its share; all that are left if absent.
    pub samples: Option<usize>,
    /// Further samples, whose labels are withheld.
    #[serde(default)]
    pub unlabelled: usize,
    /// Share of the training labels that are replaced by another class, chosen by the seed.
    #[serde(default)]
    pub label_noise: f64,
    /// The images as the worn camera of `retune demo` sees them.
    #[serde(default)]
    pub worn: bool,
    /// The network is to give back what it is given: the target is its input.
    #[serde(default)]
    pub autoencoder: bool,
    /// A classifier: what an autoencoder gives is compared by features of it, and by structure.
    pub features: Option<PathBuf>,
}

const TASK: [&str; 9] =
    ["model", "data", "test", "samples", "unlabelled", "label-noise", "worn", "autoencoder", "features"];

impl Task {
    /// The worn camera, if the images are to be its.
    pub fn camera(&self) -> Option<Worn> {
        self.worn.then(Worn::default)
    }

    fn check(&self) -> std::result::Result<(), String> {
        if !(0.0..=1.0).contains(&self.label_noise) {
            return Err(format!("label-noise {}: is a share of the labels, 0 to 1", self.label_noise));
        }
        if self.features.is_some() && !self.autoencoder {
            return Err("features: compare what an autoencoder gives".into());
        }
        if self.autoencoder && (self.label_noise > 0.0 || self.unlabelled > 0) {
            return Err("autoencoder: has no labels to be noisy or withheld".into());
        }
        if self.samples == Some(0) {
            return Err("samples: at least 1".into());
        }
        if let NumberOr::Number(n) = self.test
            && !(n >= 1.0 && n.fract() == 0.0)
        {
            return Err(format!("test {n}: a number of samples from 1, or a path"));
        }
        Ok(())
    }
}

/// One run.
#[derive(Debug, Clone)]
pub struct Cell {
    /// Unique in the study: `AXIS=POINT/…/ARM/seed=N`.
    pub name: String,
    /// (axis, point)
    pub point: Vec<(String, String)>,
    pub arm: String,
    pub seed: u64,
    pub task: Task,
    pub config: Config,
    /// What the two were made of.
    pub options: Table,
}

/// A study's file, read and spread out.
#[derive(Debug, Clone)]
pub struct Study {
    pub title: String,
    pub about: String,
    pub baseline: String,
    /// Further arms that others are compared with.
    pub controls: Vec<String>,
    pub cells: Vec<Cell>,
    /// Where relative paths begin.
    pub folder: PathBuf,
}

fn refuse<T>(path: &Path, what: impl Into<String>) -> Result<T> {
    Err(Error::file(path, what.into()))
}

/// A value as it stands in a cell's name.
fn shown(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

impl Study {
    /// Reads a study; `quick`: as its `[quick]` table has it. Every cell is checked.
    pub fn read(path: &Path, quick: bool) -> Result<Study> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let file: File = toml::from_str(&text).map_err(|e| Error::file(path, e.to_string()))?;
        let over = match quick {
            true => file.quick.clone(),
            false => Quick::default(),
        };
        // What a quick run leaves out is no control of it.
        let mut controls = file.controls.clone();
        controls.retain(|c| over.arms.as_ref().is_none_or(|only| only.contains(c)));
        let arms: Vec<&Arm> = file
            .arm
            .iter()
            .filter(|a| over.arms.as_ref().is_none_or(|only| only.contains(&a.name)))
            .collect();
        let arms: Vec<(String, Table)> = arms.into_iter().flat_map(spread).collect();
        if let Some(wrong) = over.arms.iter().flatten().find(|n| !file.arm.iter().any(|a| a.name == **n)) {
            return refuse(path, format!("quick: no arm is called '{wrong}'"));
        }
        if !arms.iter().any(|a| a.0 == file.baseline) {
            return refuse(path, format!("the baseline '{}' is not among the arms", file.baseline));
        }
        if let Some(wrong) = controls.iter().find(|c| !arms.iter().any(|a| a.0 == **c)) {
            return refuse(path, format!("the control '{wrong}' is not among the arms"));
        }
        let seeds = over.seeds.as_ref().unwrap_or(&file.seeds).list();
        if seeds.is_empty() {
            return refuse(path, "seeds: at least one");
        }
        let mut points: Vec<(Vec<(String, String)>, Table)> = vec![(Vec::new(), Table::new())];
        for axis in &file.axis {
            let mut own = axis.points().or_else(|what| refuse(path, what))?;
            if let Some(only) = over.axes.get(&axis.name) {
                let only: Vec<String> = only.iter().map(shown).collect();
                own.retain(|p| only.contains(&p.0));
            }
            if own.is_empty() {
                return refuse(path, format!("axis '{}': no points", axis.name));
            }
            points = points
                .iter()
                .flat_map(|(names, table)| {
                    own.iter().map(|(point, options)| {
                        let mut names = names.clone();
                        names.push((axis.name.clone(), point.clone()));
                        let mut table = table.clone();
                        table.extend(options.clone());
                        (names, table)
                    })
                })
                .collect();
        }
        if points.len().saturating_mul(arms.len()).saturating_mul(seeds.len()) > MOST_CELLS {
            return refuse(path, format!("more than {MOST_CELLS} cells"));
        }
        let mut cells: Vec<Cell> = Vec::new();
        for (point, of_point) in &points {
            for seed in &seeds {
                for (arm, of_arm) in &arms {
                    let mut options = file.base.clone();
                    for table in [of_point, of_arm, &over.options] {
                        options.extend(table.clone());
                    }
                    options.insert("seed".into(), Value::Integer(*seed as i64));
                    cells.push(cell(point, arm, *seed, options).or_else(|what| refuse(path, what))?);
                }
            }
        }
        let mut names: Vec<&str> = cells.iter().map(|c| c.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
            return refuse(path, format!("two cells are called '{}'", twice[0]));
        }
        let folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
        let File { title, about, baseline, .. } = file;
        Ok(Study { title, about, baseline, controls, cells, folder })
    }

    /// The arms, in the file's order.
    pub fn arms(&self) -> Vec<&str> {
        let mut arms: Vec<&str> = Vec::new();
        for c in &self.cells {
            if !arms.contains(&c.arm.as_str()) {
                arms.push(&c.arm);
            }
        }
        arms
    }

    /// The combinations of axis points, in the file's order.
    pub fn points(&self) -> Vec<&[(String, String)]> {
        let mut points: Vec<&[(String, String)]> = Vec::new();
        for c in &self.cells {
            if !points.contains(&c.point.as_slice()) {
                points.push(&c.point);
            }
        }
        points
    }
}

impl Axis {
    /// (name, options) of each point.
    fn points(&self) -> std::result::Result<Vec<(String, Table)>, String> {
        match (&self.key, self.values.is_empty(), self.point.is_empty()) {
            (Some(key), false, true) => Ok(self
                .values
                .iter()
                .map(|v| (shown(v), Table::from_iter([(key.clone(), v.clone())])))
                .collect()),
            (None, true, false) => {
                Ok(self.point.iter().map(|p| (p.name.clone(), p.options.clone())).collect())
            }
            _ => Err(format!("axis '{}': takes `key` and `values`, or [[axis.point]] tables", self.name)),
        }
    }
}

/// An arm's combinations.
fn spread(arm: &Arm) -> Vec<(String, Table)> {
    let mut all = vec![(arm.name.clone(), arm.options.clone())];
    for (key, values) in &arm.grid {
        let one = [values.clone()];
        let values: &[Value] = match values {
            Value::Array(values) => values,
            _ => &one,
        };
        all = all
            .iter()
            .flat_map(|(name, options)| {
                values.iter().map(move |v| {
                    let mut options = options.clone();
                    options.insert(key.clone(), v.clone());
                    (format!("{name} {}={}", key.trim_start_matches("icp-"), shown(v)), options)
                })
            })
            .collect();
    }
    all
}

fn cell(
    point: &[(String, String)],
    arm: &str,
    seed: u64,
    options: Table,
) -> std::result::Result<Cell, String> {
    let mut name: String = point.iter().map(|(axis, point)| format!("{axis}={point}/")).collect();
    name += &format!("{arm}/seed={seed}");
    let (task, rest): (Table, Table) =
        options.clone().into_iter().partition(|(k, _)| TASK.contains(&k.as_str()));
    let at = |what: &str| format!("{name}: {what}");
    let task: Task = task.try_into().map_err(|e: toml::de::Error| at(e.message()))?;
    task.check().map_err(|e| at(&e))?;
    let config: Config = rest.try_into().map_err(|e: toml::de::Error| at(e.message()))?;
    config.check().map_err(|e| at(&e.to_string()))?;
    // A cell is run from its beginning, in this process, and nothing of it stays but its record.
    if config.checkpoint.is_some() || config.report.is_some() || config.require.is_some() {
        return Err(at("a study takes no checkpoint, report or require"));
    }
    Ok(Cell { name, point: point.to_vec(), arm: arm.to_string(), seed, task, config, options })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        title = "T"
        baseline = "plain"
        controls = ["icp steps=1 weights=uniform"]
        seeds = 2
        [base]
        model = "m.onnx"
        data = "d.npz"
        test = 10
        lr = 1e-3
        [[axis]]
        name = "labels"
        key = "samples"
        values = [10, 20]
        [[axis]]
        name = "noise"
        [[axis.point]]
        name = "none"
        [[axis.point]]
        name = "some"
        label-noise = 0.2
        [[arm]]
        name = "plain"
        method = "supervised"
        [[arm]]
        name = "icp"
        grid = { icp-steps = [1, 5], icp-weights = ["uniform", "cosine"] }
        [quick]
        seeds = [7]
        arms = ["plain"]
        axes = { labels = [20] }
        options = { epochs = 1 }
    "#;

    fn read(text: &str, quick: bool) -> Result<Study> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.toml");
        std::fs::write(&path, text).unwrap();
        Study::read(&path, quick)
    }

    #[test]
    fn a_file_spreads_into_cells() {
        let s = read(TEXT, false).unwrap();
        assert_eq!(s.cells.len(), 4 * 2 * 5);
        assert_eq!(s.arms().len(), 5);
        assert_eq!(s.cells[0].name, "labels=10/noise=none/plain/seed=0");
        let last = s.cells.last().unwrap();
        assert_eq!(last.name, "labels=20/noise=some/icp steps=5 weights=cosine/seed=1");
        assert_eq!((last.task.samples, last.task.label_noise), (Some(20), 0.2));
        assert_eq!((last.config.icp_steps, last.config.lr, last.config.seed), (5, 1e-3, 1));
        let quick = read(TEXT, true).unwrap();
        let names: Vec<&str> = quick.cells.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["labels=20/noise=none/plain/seed=7", "labels=20/noise=some/plain/seed=7"]);
        assert_eq!(quick.cells[0].config.epochs, 1);
        assert_eq!((s.controls.len(), quick.controls.len()), (1, 0));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let bad = |from: &str, to: &str| read(&TEXT.replace(from, to), false).unwrap_err().to_string();
        assert!(bad("lr = 1e-3", "lr = -1.0").contains("--lr"));
        assert!(bad("lr = 1e-3", "rl = 1.0").contains("rl"));
        assert!(bad("baseline = \"plain\"", "baseline = \"other\"").contains("baseline"));
        assert!(bad("controls = [\"icp ", "controls = [\"").contains("control 'steps=1"));
        assert!(bad("key = \"samples\"", "").contains("axis 'labels'"));
        assert!(bad("label-noise = 0.2", "label-noise = 2.0").contains("label-noise"));
        assert!(bad("[1, 5]", "[1, 1]").contains("two cells"));
        assert!(bad("seeds = 2", "seeds = 0").contains("seeds"));
        assert!(bad("test = 10", "test = 0").contains("test"));
        assert!(bad("lr = 1e-3", "report = \"x.html\"").contains("report"));
        let unknown = TEXT.replace("arms = [\"plain\"]", "arms = [\"other\"]");
        assert!(read(&unknown, true).unwrap_err().to_string().contains("other"));
    }
}
