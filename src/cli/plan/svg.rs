//! A picture of memory over a step: which tensors live when, and where.

use std::path::Path;

use anyhow::Context;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::exec::{Program, Usage};
use crate::graph::{Graph, Source};
use crate::plan::{Block, Kind};
use crate::size::human;

const SIZE: (u32, u32) = (1400, 860);
/// Tensors that are named in the picture, at most.
const NAMED: usize = 24;
/// About the width of a letter, in pixels.
const LETTER: f64 = 6.0;
const INK: RGBColor = RGBColor(40, 44, 52);
const FRAME: RGBColor = RGBColor(255, 255, 255);

/// What a tensor is, with its colour.
const KINDS: [(&str, RGBColor); 11] = [
    ("weights, statistics", RGBColor(70, 84, 104)),
    ("optimizer state", RGBColor(112, 128, 150)),
    ("summed gradients", RGBColor(178, 110, 70)),
    ("kept between programs", RGBColor(150, 118, 20)),
    ("copies of frozen weights", RGBColor(160, 172, 188)),
    ("input", RGBColor(46, 125, 80)),
    ("activation", RGBColor(52, 120, 186)),
    ("computed again", RGBColor(126, 196, 232)),
    ("gradient of an activation", RGBColor(240, 160, 80)),
    ("gradient of a weight", RGBColor(200, 70, 40)),
    ("scratch", RGBColor(206, 206, 200)),
];

/// The index in [`KINDS`] of a block.
fn kind(graph: &Graph, block: &Block) -> usize {
    let value = graph.value(block.name);
    match (block.kind, &value.source) {
        (Kind::Scratch, _) => 10,
        (Kind::Gradient, _) => 9,
        (_, Source::Input) => 5,
        (_, Source::Node(n, _)) if graph.again.contains_key(n) => 7,
        _ if value.name.starts_with("grad/") => 8,
        _ => 6,
    }
}

/// The last parts of a name as exporters make them.
fn short(name: &str) -> String {
    let name = name.strip_prefix("grad/").unwrap_or(name);
    let name = name.split("_output_").next().unwrap_or(name).trim_matches('/');
    let parts: Vec<&str> = name.split('/').collect();
    parts[parts.len().saturating_sub(2)..].join("/")
}

struct Rect {
    x: (f64, f64),
    y: (f64, f64),
    kind: usize,
    text: String,
}

/// Draws the programs of a step one after the other, on top of what lives all the time; `limit` is drawn as a line.
pub fn draw(
    path: &Path,
    title: &str,
    programs: &[(&str, &Program)],
    memory: &Usage,
    limit: Option<usize>,
) -> anyhow::Result<()> {
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let standing =
        [memory.weights + memory.statistics, memory.optimizer, memory.gradients, memory.step, memory.frozen];
    let lengths: Vec<usize> =
        programs.iter().map(|(_, p)| p.plan.blocks.iter().map(|b| b.dies + 1).max().unwrap_or(1)).collect();
    let width = lengths.iter().sum::<usize>().max(1) as f64;
    let mut rects = Vec::new();
    let mut floor = 0.0;
    for (k, bytes) in standing.into_iter().enumerate().filter(|s| s.1 > 0) {
        let top = floor + mib(bytes);
        let text = format!("{} {}", KINDS[k].0, human(bytes));
        rects.push(Rect { x: (0.0, width), y: (floor, top), kind: k, text });
        floor = top;
    }
    let mut begin = 0;
    for ((_, p), length) in programs.iter().zip(&lengths) {
        for b in p.plan.blocks.iter().filter(|b| b.bytes > 0) {
            let low = floor + mib(b.offset);
            rects.push(Rect {
                x: ((begin + b.born) as f64, (begin + b.dies + 1) as f64),
                y: (low, low + mib(b.bytes)),
                kind: kind(&p.graph, b),
                text: format!("{} {}", short(&p.graph.value(b.name).name), human(b.bytes)),
            });
        }
        begin += length;
    }
    let top = rects.iter().map(|r| r.y.1).chain(limit.map(mib)).fold(0.0, f64::max).max(1e-3) * 1.02;
    let mut svg = String::new();
    plot(&mut svg, title, &rects, (width, top), programs, &lengths, limit.map(mib))
        .map_err(|e| anyhow::anyhow!("the picture: {e}"))?;
    std::fs::write(path, svg).with_context(|| path.display().to_string())
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn plot(
    svg: &mut String,
    title: &str,
    rects: &[Rect],
    (width, top): (f64, f64),
    programs: &[(&str, &Program)],
    lengths: &[usize],
    limit: Option<f64>,
) -> Drawn {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let font = |size: u32| ("sans-serif", size).into_font().color(&INK);
    root.draw(&Text::new(title.to_string(), (74, 14), font(19)))?;
    let used: Vec<usize> = (0..KINDS.len()).filter(|k| rects.iter().any(|r| r.kind == *k)).collect();
    let mut x = 74;
    for k in used {
        root.draw(&Rectangle::new([(x, 46), (x + 13, 59)], KINDS[k].1.filled()))?;
        root.draw(&Text::new(KINDS[k].0, (x + 18, 46), font(13)))?;
        x += 34 + (KINDS[k].0.len() as f64 * 6.6) as i32;
    }
    let (_, area) = root.split_vertically(70);
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(62)
        .build_cartesian_2d(0.0..width, 0.0..top)?;
    let label = font(13);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(226, 226, 222))
        .axis_style(INK)
        .label_style(label.clone())
        .x_desc("kernel calls, in order")
        .y_desc("MiB")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    chart.draw_series(
        rects.iter().map(|r| Rectangle::new([(r.x.0, r.y.0), (r.x.1, r.y.1)], KINDS[r.kind].1.filled())),
    )?;
    chart.draw_series(
        rects.iter().map(|r| Rectangle::new([(r.x.0, r.y.0), (r.x.1, r.y.1)], FRAME.stroke_width(1))),
    )?;
    let pixels = chart.plotting_area().dim_in_pixel();
    let across = |r: &Rect| (r.x.1 - r.x.0) / width * f64::from(pixels.0);
    let high = |r: &Rect| (r.y.1 - r.y.0) / top * f64::from(pixels.1);
    // Those with the most room for a name.
    let mut named: Vec<&Rect> =
        rects.iter().filter(|r| high(r) >= 12.0 && across(r) >= 8.0 * LETTER).collect();
    named.sort_by(|a, b| (across(b) * high(b)).total_cmp(&(across(a) * high(a))));
    for r in named.into_iter().take(NAMED) {
        let room = (across(r) / LETTER) as usize;
        let text: String = r.text.chars().take(room.saturating_sub(1)).collect();
        let colour = KINDS[r.kind].1;
        let dark = u32::from(colour.0) + u32::from(colour.1) + u32::from(colour.2) < 420;
        let style = ("sans-serif", 11).into_font().color(if dark { &WHITE } else { &BLACK });
        let style = style.pos(Pos::new(HPos::Center, VPos::Center));
        let middle = ((r.x.0 + r.x.1) / 2.0, (r.y.0 + r.y.1) / 2.0);
        chart.draw_series([Text::new(text, middle, style)])?;
    }
    let mut begin = 0.0;
    for ((name, _), length) in programs.iter().zip(lengths).filter(|_| programs.len() > 1) {
        if begin > 0.0 {
            chart.draw_series([PathElement::new([(begin, 0.0), (begin, top)], INK)])?;
        }
        chart.draw_series([Text::new(
            name.to_string(),
            (begin + width * 0.004, top * 0.995),
            label.clone(),
        )])?;
        begin += *length as f64;
    }
    if let Some(limit) = limit {
        chart.draw_series([PathElement::new([(0.0, limit), (width, limit)], RED.stroke_width(2))])?;
        let text = format!("{limit:.0} MiB");
        chart.draw_series([Text::new(text, (width * 0.955, limit), label.color(&RED))])?;
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_to_what_tells_them_apart() {
        assert_eq!(short("/layer1/layer1.0/conv1/Conv_output_0"), "conv1/Conv");
        assert_eq!(short("grad//a/b/Add_output_0/Relu"), "b/Add");
        assert_eq!(short("x"), "x");
    }
}
