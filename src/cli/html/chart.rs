//! Line charts as inline SVG, drawn by plotters in light-mode colours; the style sheet exchanges them in dark
//! mode, which is why [`SERIES`], [`INK`] and [`GRID`] exist in both.

use std::fmt::Write as _;

use plotters::prelude::*;

use super::{Series, escape};

/// Line colours: as drawn (light mode), and their stand-ins in dark mode. Later series start over.
const SERIES: [(RGBColor, &str); 6] = [
    (RGBColor(31, 95, 160), "#7ab3ea"),
    (RGBColor(200, 90, 26), "#f0a060"),
    (RGBColor(46, 125, 80), "#76c893"),
    (RGBColor(142, 68, 140), "#d198d0"),
    (RGBColor(150, 118, 20), "#d9c05c"),
    (RGBColor(92, 100, 112), "#aab2be"),
];
const INK: (RGBColor, &str) = (RGBColor(94, 98, 106), "#a3a8b1");
const GRID: (RGBColor, &str) = (RGBColor(226, 226, 222), "#34373d");
/// plotters places everything on whole units, so a unit is a tenth of a pixel.
const UNIT: u32 = 10;
/// More points than this are thinned: the page shows no more.
const MAX_POINTS: usize = 1000;
/// Up to this many points each is marked.
const MAX_MARKS: usize = 30;

fn hex(color: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", color.0, color.1, color.2)
}

/// The colours of legends, and of plotters' marks in dark mode.
pub fn css() -> String {
    let mut css = String::new();
    for (i, (light, _)) in SERIES.iter().enumerate() {
        let _ = writeln!(css, ".k{i}{{background:{}}}", hex(*light));
    }
    css.push_str("@media screen and (prefers-color-scheme:dark){\n");
    for (i, (_, dark)) in SERIES.iter().enumerate() {
        let _ = writeln!(css, ".k{i}{{background:{dark}}}");
    }
    for (light, dark) in SERIES.iter().chain([&INK, &GRID]) {
        let light = hex(*light);
        let _ = writeln!(
            css,
            ".plot [stroke=\"{light}\"]{{stroke:{dark}}} .plot [fill=\"{light}\"]{{fill:{dark}}}"
        );
    }
    css.push_str("}\n");
    css
}

pub fn figure(html: &mut String, title: &str, x_label: &str, y_label: &str, series: &[Series]) {
    let lines: Vec<Vec<(f64, f64)>> = series.iter().map(|s| drawable(&s.points)).collect();
    html.push_str("<figure class=\"chart\">\n");
    if lines.iter().all(Vec::is_empty) {
        html.push_str("<p class=\"none\">Nothing to draw: no finite points.</p>\n");
        return;
    }
    let _ = write!(
        html,
        "<div class=\"head\"><span class=\"axis\">{}</span><ul class=\"legend\">",
        escape(y_label)
    );
    for (i, (s, line)) in series.iter().zip(&lines).enumerate() {
        let remark = if line.is_empty() { " (no finite points)" } else { "" };
        let _ = write!(html, "<li><i class=\"k{}\"></i>{}{remark}</li>", i % SERIES.len(), escape(&s.name));
    }
    html.push_str("</ul></div>\n");
    let label = describe(title, x_label, y_label, series, &lines);
    for (class, width, height) in [("plot wide", 920, 300), ("plot narrow", 400, 280)] {
        if let Some(svg) = plot(&lines, width, height) {
            let _ = writeln!(
                html,
                "<svg class=\"{class}\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{label}\">{svg}",
                width * UNIT,
                height * UNIT
            );
        }
    }
    let _ = writeln!(html, "<p class=\"axis x\">{}</p>", escape(x_label));
}

/// Finite points in the order of x, thinned to what a page can show: the lowest and highest of each run.
fn drawable(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    // Beyond 1e100 the difference of two values could overflow.
    let sound = |v: f64| v.abs() <= 1e100;
    let mut kept: Vec<_> = points.iter().copied().filter(|&(x, y)| sound(x) && sound(y)).collect();
    kept.sort_by(|a, b| a.0.total_cmp(&b.0));
    if kept.len() <= MAX_POINTS {
        return kept;
    }
    let run = kept.len().div_ceil(MAX_POINTS / 2);
    let mut thinned = Vec::with_capacity(MAX_POINTS + 2);
    thinned.push(kept[0]);
    for points in kept.chunks(run) {
        let by_y = |a: &usize, b: &usize| points[*a].1.total_cmp(&points[*b].1);
        let (low, high) =
            (0..points.len()).min_by(by_y).zip((0..points.len()).max_by(by_y)).unwrap_or((0, 0));
        thinned.push(points[low.min(high)]);
        if low != high {
            thinned.push(points[low.max(high)]);
        }
    }
    thinned.push(kept[kept.len() - 1]);
    thinned
}

/// The chart in words, escaped.
fn describe(
    title: &str,
    x_label: &str,
    y_label: &str,
    series: &[Series],
    lines: &[Vec<(f64, f64)>],
) -> String {
    let mut text = format!("{title}: {y_label} over {x_label}.");
    for (s, line) in series.iter().zip(lines) {
        if let (Some(first), Some(last)) = (line.first(), line.last()) {
            let digits = digits(first.1.abs().max(last.1.abs()) / 100.0);
            let (from, to) = (number(first.1, digits), number(last.1, digits));
            let _ = write!(text, " {}: from {from} to {to}.", s.name);
        }
    }
    escape(&text)
}

/// Decimals that tell multiples of `step` apart; `None`: write powers of ten.
fn digits(step: f64) -> Option<usize> {
    let power = step.log10().floor();
    (-4.0..6.0).contains(&power).then(|| (-power).max(0.0) as usize)
}

fn number(value: f64, digits: Option<usize>) -> String {
    let text = match digits {
        Some(digits) => format!("{value:.digits$}"),
        None if value == 0.0 => "0".into(),
        None => {
            let text = format!("{value:.3e}");
            let (mantissa, power) = text.split_once('e').unwrap_or((&text, "0"));
            format!("{}e{power}", mantissa.trim_end_matches('0').trim_end_matches('.'))
        }
    };
    // "-0.00" is zero.
    match text.strip_prefix('-') {
        Some(rest) if rest.chars().all(|c| matches!(c, '0' | '.')) => rest.into(),
        _ => text.replace('-', "\u{2212}"),
    }
}

/// An axis from `low` to `high` with ticks every `step`. plotters is given values over `unit`, a power of ten
/// near the span: its search for ticks compares with an absolute epsilon.
struct Axis {
    low: f64,
    high: f64,
    unit: f64,
    step: f64,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64> + Clone, ticks: f64, whole_ticks: bool) -> Axis {
        let mut low = values.clone().fold(f64::INFINITY, f64::min);
        let mut high = values.clone().fold(f64::NEG_INFINITY, f64::max);
        if whole_ticks && low > 0.0 && low < 0.4 * high {
            low = 0.0;
        }
        let least = (low.abs().max(high.abs()) * 1e-6).max(1e-90);
        if high - low < least {
            let room = if high.abs() < 1e-80 { 0.5 } else { 0.1 * high.abs() };
            (low, high) = (low - room, high + room);
        }
        let rough = (high - low) / ticks;
        let power = 10f64.powf(rough.log10().floor());
        let mut step =
            [1.0, 2.0, 5.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(10.0 * power);
        if !whole_ticks && values.clone().all(|v| v.fract() == 0.0) {
            step = step.max(1.0); // epochs and steps are counted
        }
        if whole_ticks {
            // A value within a hundredth of a step of a tick needs no further tick.
            low = (low / step + 0.01).floor() * step;
            high = (high / step - 0.01).ceil() * step;
        }
        Axis { low, high, unit: 10f64.powf((high - low).log10().floor()), step }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low / self.unit..self.high / self.unit
    }

    fn ticks(&self) -> usize {
        ((self.high - self.low) / self.step + 1.01).floor().clamp(2.0, 20.0) as usize
    }

    fn text(&self, over_unit: f64) -> String {
        number(over_unit * self.unit, digits(self.step * 1.001))
    }
}

/// What belongs inside the `<svg>`; `None` when plotters gives up. At least one line has a point.
fn plot(lines: &[Vec<(f64, f64)>], width: u32, height: u32) -> Option<String> {
    let px = |pixels: u32| pixels * UNIT;
    let all = lines.iter().flatten();
    let x = Axis::new(all.clone().map(|p| p.0), f64::from(width) / 95.0, false);
    let y = Axis::new(all.map(|p| p.1), 5.0, true);
    let longest = [y.range().start, y.range().end].map(|v| y.text(v).chars().count()).into_iter().max()?;

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (px(width), px(height))).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin_top(px(8))
            .margin_right(px(14))
            .x_label_area_size(px(24))
            .y_label_area_size(px(14 + 8 * longest.max(3) as u32))
            .build_cartesian_2d(x.range(), y.range())
            .ok()?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID.0.stroke_width(UNIT))
            .axis_style(TRANSPARENT)
            .set_all_tick_mark_size(px(6))
            .label_style(("sans-serif", px(16), &INK.0))
            .x_labels(x.ticks())
            .y_labels(y.ticks())
            .x_label_formatter(&|v| x.text(*v))
            .y_label_formatter(&|v| y.text(*v))
            .draw()
            .ok()?;
        for (i, line) in lines.iter().enumerate() {
            let color = SERIES[i % SERIES.len()].0;
            let line: Vec<_> = line.iter().map(|p| (p.0 / x.unit, p.1 / y.unit)).collect();
            if line.len() <= MAX_MARKS {
                let marks = line.iter().map(|p| Circle::new(*p, 3 * UNIT, color.filled()));
                chart.draw_series(marks).ok()?;
            }
            chart.draw_series([PathElement::new(line, color.stroke_width(2 * UNIT))]).ok()?;
        }
        root.present().ok()?;
    }
    // plotters' own opening tag has a fixed size and no words for those who cannot see the chart.
    let (_, inside) = svg.split_once('>')?;
    Some(inside.replace(" opacity=\"1\"", "").replace('\n', ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_survive_any_range() {
        let scales = [
            0.0,
            -0.0,
            5e-324,
            1e-300,
            1e-17,
            1e-9,
            0.3,
            1.0,
            7.0,
            12345.678,
            1e16,
            1e99,
            1e100,
            1e101,
            f64::MAX,
        ];
        for a in scales {
            for b in scales {
                for points in [
                    vec![(a, b)],
                    vec![(a, b), (b, a)],
                    vec![(-a, b), (b, -a), (1.0, 1.0)],
                    vec![(1.0, a), (2.0, a + b)],
                ] {
                    let series = [Series { name: "s".into(), points: points.clone() }];
                    let mut html = String::new();
                    figure(&mut html, "t", "x", "y", &series);
                    assert!(html.len() < 20_000 && !html.contains("NaN"), "{points:?}");
                }
            }
        }
    }

    #[test]
    fn long_series_are_thinned_and_keep_their_extremes() {
        let mut points: Vec<_> =
            (0..100_000).map(|i| (f64::from(i), 1.0 + f64::from(i % 7) / 10.0)).collect();
        points[40_321].1 = 9.0;
        let thinned = drawable(&points);
        assert!(thinned.len() <= MAX_POINTS + 2);
        assert!(thinned.contains(&(40_321.0, 9.0)));
        assert_eq!((thinned[0].0, thinned[thinned.len() - 1].0), (0.0, 99_999.0));
        assert!(thinned.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn ticks_are_round_numbers() {
        let ticks = |values: &[f64], whole| {
            let axis = Axis::new(values.iter().copied(), 5.0, whole);
            (axis.text(axis.range().start), axis.text(axis.range().end), axis.ticks())
        };
        assert_eq!(ticks(&[0.47, 0.93], true), (String::from("0.4"), String::from("1.0"), 7));
        assert_eq!(ticks(&[0.1, 2.12], true), (String::from("0.0"), String::from("2.5"), 6));
        assert_eq!(ticks(&[-3e-7, 1e-7], true), (String::from("−3e−7"), String::from("1e−7"), 5));
        assert_eq!(ticks(&[1.0, 3.0], false), (String::from("1"), String::from("3"), 3));
    }
}
