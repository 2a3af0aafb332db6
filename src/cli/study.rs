//! `retune study`: a grid of finetunes from one file, its tables and its page.

use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::atomic;
use crate::study::{Cell, Record, Records, Runner, Study, Table};

use super::html::{Page, Section, Series, render};

#[derive(clap::Args)]
pub struct Args {
    /// The study's file
    #[arg(value_name = "CONFIG.toml")]
    config: PathBuf,
    /// The smaller study that the file's [quick] table describes
    #[arg(long)]
    quick: bool,
    /// Folder for results.jsonl, table.md and index.html [default: target/study/NAME]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Run this cell again and compare with what is recorded of it
    #[arg(long, value_name = "NAME")]
    cell: Option<String>,
    /// Print the cells' names and run nothing
    #[arg(long, conflicts_with = "cell")]
    list: bool,
    /// Write the tables of what is recorded and run nothing
    #[arg(long, conflicts_with_all = ["cell", "list"])]
    tables: bool,
    /// Threads to compute with [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    #[arg(long)]
    json: bool,
}

/// A cell that was run again.
#[derive(serde::Serialize)]
struct Again<'a> {
    record: &'a Record,
    /// Are all its numbers those that were recorded? Absent where nothing was.
    #[serde(skip_serializing_if = "Option::is_none")]
    reproduced: Option<bool>,
}

pub fn main(args: &Args) -> anyhow::Result<u8> {
    let study = Study::read(&args.config, args.quick)?;
    if args.list {
        study.cells.iter().for_each(|c| outln!("{}", c.name));
        return Ok(0);
    }
    let folder = args.output.clone().unwrap_or_else(|| default_folder(&args.config));
    // A quick run's numbers are no study's.
    let folder = if args.quick { folder.join("quick") } else { folder };
    let mut records = Records::open(&folder.join("results.jsonl"))?;
    let mut runner = Runner::new(&study, args.threads)?;
    if let Some(name) = &args.cell {
        let cell = study.cells.iter().find(|c| c.name == *name);
        let cell = cell.with_context(|| format!("no cell is called '{name}': --list prints their names"))?;
        return again(args, &mut runner, &mut records, cell);
    }
    let mut ran = 0;
    for (i, cell) in study.cells.iter().enumerate() {
        let fingerprint = runner.fingerprint(cell)?;
        if args.tables || records.find(&cell.name, &fingerprint).is_some() {
            continue;
        }
        let record = runner.run(cell, &mut |_| {}).with_context(|| cell.name.clone())?;
        eprintln!("[{}/{}] {}: {}", i + 1, study.cells.len(), cell.name, told(&record));
        records.add(record)?;
        ran += 1;
    }
    let mut found = Vec::new();
    for cell in &study.cells {
        let fingerprint = runner.fingerprint(cell)?;
        found.extend(records.find(&cell.name, &fingerprint));
    }
    let table = Table::new(&study, &found);
    let text = table.markdown();
    atomic::write_bytes(&folder.join("table.md"), text.as_bytes())?;
    atomic::write_bytes(&folder.join("index.html"), render(&page(&study, &table)).as_bytes())?;
    match args.json {
        true => super::print_json(&table)?,
        false => outln!("{text}"),
    }
    eprintln!("{ran} cells run, {} recorded; {}", found.len(), folder.join("index.html").display());
    Ok(0)
}

fn default_folder(config: &Path) -> PathBuf {
    Path::new("target/study").join(config.file_stem().unwrap_or_default())
}

fn told(r: &Record) -> String {
    format!("{} ({:.1} s)", super::eval::describe(&r.after), r.seconds)
}

/// Runs one cell; where it is recorded already, every number must come out as it was.
fn again(args: &Args, runner: &mut Runner, records: &mut Records, cell: &Cell) -> anyhow::Result<u8> {
    let record = runner.run(cell, &mut |_| {})?;
    let before = records.find(&cell.name, &record.fingerprint).cloned();
    let reproduced = before.as_ref().map(|b| b.after == record.after && b.before == record.before);
    match &reproduced {
        Some(true) => eprintln!("{}: {}, as recorded", cell.name, told(&record)),
        Some(false) => {
            let was = before.as_ref().map(told).unwrap_or_default();
            eprintln!("{}: {}; recorded was {was}", cell.name, told(&record));
        }
        None => {
            eprintln!("{}: {}", cell.name, told(&record));
            records.add(record.clone())?;
        }
    }
    if args.json {
        super::print_json(&Again { record: &record, reproduced })?;
    }
    Ok(if reproduced == Some(false) { super::FAILED } else { 0 })
}

fn page(study: &Study, table: &Table) -> Page {
    let mut sections = charts(table);
    for block in &table.blocks {
        sections.push(Section::Table {
            title: block.title(),
            header: table.header(),
            rows: block.rows.iter().map(|r| r.cells()).collect(),
        });
        let bars = block.rows.iter().filter_map(|r| {
            let a = r.accuracy?;
            let interval = a.interval.map(|i| format!(" ± {:.1}", 100.0 * i)).unwrap_or_default();
            Some((r.arm.clone(), a.mean, format!("{:.1}%{interval}", 100.0 * a.mean)))
        });
        let bars: Vec<_> = bars.collect();
        if !bars.is_empty() {
            let title = format!("Accuracy: {}", block.title());
            sections.push(Section::Bars { title, bars, note: None });
        }
    }
    let facts = vec![
        ("cells recorded".to_string(), format!("{} of {}", table.recorded, table.cells)),
        ("baseline".into(), table.baseline.clone()),
        ("compute".into(), format!("{:.1} min", table.seconds / 60.0)),
    ];
    let lead = format!(
        "{} Means over seeds with 95% intervals; differences from {} are paired by seed, in percentage points of accuracy.",
        study.about, study.baseline
    );
    Page { title: format!("retune study: {}", study.title), lead, facts, sections }
}

/// Accuracy, and the difference from the baseline, along the last axis, where its points are numbers.
fn charts(table: &Table) -> Vec<Section> {
    let Some(axis) = table.blocks.first().and_then(|b| b.point.last()).map(|p| p.0.clone()) else {
        return Vec::new();
    };
    let number = |point: &[(String, String)]| point.last().and_then(|p| p.1.parse::<f64>().ok());
    let mut others: Vec<&[(String, String)]> = Vec::new();
    for b in &table.blocks {
        let rest = &b.point[..b.point.len().saturating_sub(1)];
        if !others.contains(&rest) {
            others.push(rest);
        }
    }
    let mut sections = Vec::new();
    for rest in others {
        let blocks: Vec<_> = table.blocks.iter().filter(|b| b.point.starts_with(rest)).collect();
        if blocks.len() < 2 || blocks.iter().any(|b| number(&b.point).is_none()) {
            continue;
        }
        let arms: Vec<&str> = blocks[0].rows.iter().map(|r| r.arm.as_str()).collect();
        let series = |f: &dyn Fn(&crate::study::Row) -> Option<f64>| -> Vec<Series> {
            let line = |arm: &&str| Series {
                name: arm.to_string(),
                points: blocks
                    .iter()
                    .filter_map(|b| {
                        let row = b.rows.iter().find(|r| r.arm == **arm)?;
                        Some((number(&b.point)?, f(row)?))
                    })
                    .collect(),
            };
            arms.iter().map(line).filter(|s| !s.points.is_empty()).collect()
        };
        let where_ = rest.iter().map(|(a, p)| format!(", {a} {p}")).collect::<String>();
        for (what, y, lines) in [
            ("Accuracy", "accuracy", series(&|r| r.accuracy.map(|a| a.mean))),
            (
                "Difference from the baseline",
                "percentage points",
                series(&|r| r.difference.as_ref().map(|d| 100.0 * d.mean.mean)),
            ),
        ] {
            if !lines.is_empty() {
                sections.push(Section::Chart {
                    title: format!("{what} by {axis}{where_}"),
                    x_label: axis.clone(),
                    y_label: y.into(),
                    series: lines,
                    note: None,
                });
            }
        }
    }
    sections
}
