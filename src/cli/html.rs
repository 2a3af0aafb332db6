//! Self-contained HTML report pages: one file, no scripts, nothing loaded from elsewhere.
//!
//! Knows nothing of the rest of the crate. Every text is escaped, the same [`Page`] gives the same bytes, and
//! input that makes no sense (NaN, images of the wrong size, a matrix with counts missing) leaves a remark on
//! the page instead of a panic.

mod chart;

use std::fmt::Write as _;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder as _};

pub struct Page {
    pub title: String,
    /// One paragraph under the title.
    pub lead: String,
    /// What the page is about at a glance: (name, value).
    pub facts: Vec<(String, String)>,
    pub sections: Vec<Section>,
}

pub enum Section {
    /// Lines over a common x axis; points that are not finite are left out.
    Chart {
        title: String,
        x_label: String,
        y_label: String,
        series: Vec<Series>,
        note: Option<String>,
    },
    /// Horizontal bars: (label, share of the full width in 0..1, text at its end).
    Bars {
        title: String,
        bars: Vec<(String, f64, String)>,
        note: Option<String>,
    },
    /// Confusion matrices side by side: (caption, classes, counts), row = label, column = prediction, row major.
    Confusions {
        title: String,
        class_names: Vec<String>,
        matrices: Vec<(String, usize, Vec<u64>)>,
    },
    /// Rows of small images.
    Strips {
        title: String,
        strips: Vec<Strip>,
    },
    Table {
        title: String,
        header: Vec<String>,
        rows: Vec<Vec<String>>,
    },
}

pub struct Series {
    pub name: String,
    /// (x, y)
    pub points: Vec<(f64, f64)>,
}

pub struct Strip {
    pub caption: String,
    pub width: usize,
    pub height: usize,
    /// Grey, `width * height` bytes each, row major.
    pub images: Vec<Vec<u8>>,
}

/// The whole page as one HTML document.
pub fn render(page: &Page) -> String {
    let title = escape(&page.title);
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<link rel=\"icon\" href=\"data:,\">\n\
         <title>{title}</title>\n<style>\n{}{}</style>\n</head>\n<body>\n<main>\n<header>\n<h1>{title}</h1>\n",
        include_str!("html/page.css"),
        chart::css(),
    );
    if !page.lead.is_empty() {
        let _ = writeln!(html, "<p class=\"lead\">{}</p>", escape(&page.lead));
    }
    if !page.facts.is_empty() {
        html.push_str("<dl class=\"facts\">\n");
        for (name, value) in &page.facts {
            let _ = writeln!(html, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), breakable(value));
        }
        html.push_str("</dl>\n");
    }
    html.push_str("</header>\n");
    for section in &page.sections {
        let title = match section {
            Section::Chart { title, .. }
            | Section::Bars { title, .. }
            | Section::Confusions { title, .. }
            | Section::Strips { title, .. }
            | Section::Table { title, .. } => title,
        };
        let _ = writeln!(html, "<section>\n<h2>{}</h2>", escape(title));
        match section {
            Section::Chart { title, x_label, y_label, series, note } => {
                chart::figure(&mut html, title, x_label, y_label, series);
                close_figure(&mut html, note.as_deref());
            }
            Section::Bars { bars, note, .. } => {
                bar_list(&mut html, bars);
                close_figure(&mut html, note.as_deref());
            }
            Section::Confusions { class_names, matrices, .. } => confusions(&mut html, class_names, matrices),
            Section::Strips { strips, .. } => strips.iter().for_each(|strip| image_strip(&mut html, strip)),
            Section::Table { header, rows, .. } => table(&mut html, header, rows),
        }
        html.push_str("</section>\n");
    }
    html.push_str("</main>\n</body>\n</html>\n");
    html
}

/// Text made safe for elements and quoted attributes, of XML as well: characters that it does not have become U+FFFD.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Escaped, and a long path may be broken after each slash.
fn breakable(text: &str) -> String {
    escape(text).replace('/', "/<wbr>")
}

fn close_figure(html: &mut String, note: Option<&str>) {
    if let Some(note) = note {
        let _ = writeln!(html, "<figcaption>{}</figcaption>", escape(note));
    }
    html.push_str("</figure>\n");
}

fn bar_list(html: &mut String, bars: &[(String, f64, String)]) {
    html.push_str("<figure class=\"bars\">\n");
    if bars.is_empty() {
        html.push_str("<p class=\"none\">Nothing to draw: no bars.</p>\n");
        return;
    }
    html.push_str("<ul>\n");
    for (label, value, text) in bars {
        let percent = if value.is_finite() { value.clamp(0.0, 1.0) * 100.0 } else { 0.0 };
        let _ = writeln!(
            html,
            "<li><span class=\"label\">{}</span><span class=\"track\"><i style=\"width:{percent:.2}%\"></i></span>\
             <span class=\"value\">{}</span></li>",
            escape(label),
            escape(text)
        );
    }
    html.push_str("</ul>\n");
}

fn table(html: &mut String, header: &[String], rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).chain([header.len()]).max().unwrap_or(0);
    let numeric: Vec<bool> = (0..columns)
        .map(|c| {
            let mut cells = rows.iter().filter_map(|r| r.get(c)).filter(|t| !t.is_empty()).peekable();
            cells.peek().is_some() && cells.all(|t| is_number(t))
        })
        .collect();
    let row = |html: &mut String, cells: &[String], tag: &str| {
        html.push_str("<tr>");
        for (c, numeric) in numeric.iter().enumerate() {
            let class = if *numeric { " class=\"num\"" } else { "" };
            let text = cells.get(c).map(|t| escape(t)).unwrap_or_default();
            let scope = if tag == "th" { " scope=\"col\"" } else { "" };
            let _ = write!(html, "<{tag}{scope}{class}>{text}</{tag}>");
        }
        html.push_str("</tr>\n");
    };
    html.push_str("<div class=\"scroll\"><table class=\"plain\">\n");
    if !header.is_empty() {
        html.push_str("<thead>");
        row(html, header, "th");
        html.push_str("</thead>");
    }
    html.push_str("<tbody>\n");
    rows.iter().for_each(|cells| row(html, cells, "td"));
    html.push_str("</tbody></table></div>\n");
}

/// Starts with a digit after an optional sign, or stands for a missing number: set flush right.
fn is_number(text: &str) -> bool {
    let text = text.trim().trim_start_matches(['+', '-', '\u{2212}', '.', '<', '>', '±', '×', '≤', '≥']);
    text.is_empty()
        || matches!(text, "–" | "—" | "n/a" | "NaN" | "inf")
        || text.starts_with(|c: char| c.is_ascii_digit())
}

fn png_uri(pixels: &[u8], width: usize, height: usize, color: ExtendedColorType) -> Option<String> {
    let bytes = width.checked_mul(height)?.checked_mul(usize::from(color.bits_per_pixel() / 8))?;
    if bytes == 0 || bytes != pixels.len() {
        return None;
    }
    let mut file = Vec::new();
    PngEncoder::new_with_quality(&mut file, CompressionType::Best, FilterType::Adaptive)
        .write_image(pixels, width.try_into().ok()?, height.try_into().ok()?, color)
        .ok()?;
    Some(format!("data:image/png;base64,{}", BASE64.encode(file)))
}

fn image_strip(html: &mut String, strip: &Strip) {
    let caption = escape(&strip.caption);
    let Strip { width, height, .. } = *strip;
    let scale = match width.max(height) {
        ..=96 => 3,
        97..=160 => 2,
        _ => 1,
    };
    let _ = write!(
        html,
        "<figure class=\"strip\">\n<figcaption>{caption}</figcaption>\n<div class=\"images\" style=\"--w:{}px;--min:{}px\">",
        width.saturating_mul(scale),
        (width / 4 * 3).min(56),
    );
    for (i, pixels) in strip.images.iter().enumerate() {
        match png_uri(pixels, width, height, ExtendedColorType::L8) {
            Some(uri) => {
                let (at, of) = (i + 1, strip.images.len());
                let _ = write!(
                    html,
                    "<img width=\"{width}\" height=\"{height}\" alt=\"{caption}: {at} of {of}\" src=\"{uri}\">"
                );
            }
            None => html.push_str("<span class=\"gap\">no image</span>"),
        }
    }
    if strip.images.is_empty() {
        html.push_str("<span class=\"none\">No images.</span>");
    }
    html.push_str("</div>\n</figure>\n");
}

/// Up to so many classes the counts stand in the cells of a table; above, the matrix is an image.
const MAX_TABLE: usize = 12;
/// Above this many classes the image would be the bulk of the page.
const MAX_IMAGE: usize = 1024;

fn confusions(html: &mut String, names: &[String], matrices: &[(String, usize, Vec<u64>)]) {
    html.push_str("<div class=\"pair\">\n");
    for (caption, classes, counts) in matrices {
        let _ = writeln!(html, "<figure class=\"confusion\">\n<figcaption>{}</figcaption>", escape(caption));
        if *classes == 0 || classes.checked_mul(*classes) != Some(counts.len()) {
            let _ = writeln!(
                html,
                "<p class=\"none\">{} counts do not fill {classes} classes.</p>",
                counts.len()
            );
        } else if *classes <= MAX_TABLE {
            confusion_table(html, names, *classes, counts);
        } else {
            confusion_image(html, caption, *classes, counts);
        }
        html.push_str("</figure>\n");
    }
    html.push_str(
        "</div>\n<p class=\"small\">Rows are labels, columns predictions. \
         <span class=\"key\"><i class=\"swatch hit\"></i> right,</span> <span class=\"key\"><i class=\"swatch miss\"></i> wrong;</span> \
         the stronger, the larger the share of its row (square root).</p>\n",
    );
}

/// The square root of each count's share of its row, so that rare mistakes are seen.
fn strengths(classes: usize, counts: &[u64]) -> impl Iterator<Item = (usize, usize, u64, f64)> + '_ {
    counts.chunks(classes).enumerate().flat_map(|(label, row)| {
        let total = row.iter().map(|c| *c as f64).sum::<f64>().max(1.0);
        row.iter()
            .enumerate()
            .map(move |(guess, &count)| (label, guess, count, (count as f64 / total).sqrt()))
    })
}

fn confusion_table(html: &mut String, names: &[String], classes: usize, counts: &[u64]) {
    let name = |c: usize| names.get(c).map_or_else(|| c.to_string(), |n| escape(n));
    let short = (0..classes).all(|c| names.get(c).is_none_or(|n| n.chars().count() <= 2));
    let _ = write!(html, "<table class=\"heat{}\">\n<thead><tr><td></td>", if short { " short" } else { "" });
    for guess in 0..classes {
        let _ = write!(html, "<th scope=\"col\"><span>{}</span></th>", name(guess));
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for (label, guess, count, strength) in strengths(classes, counts) {
        if guess == 0 {
            let _ = write!(html, "<tr><th scope=\"row\">{}</th>", name(label));
        }
        let kind = if label == guess { "hit" } else { "miss" };
        match count {
            0 => html.push_str("<td></td>"),
            _ => {
                let strong = match strength {
                    0.75.. => " strong",
                    0.6..0.75 => " middle",
                    _ => "",
                };
                let _ = write!(html, "<td class=\"{kind}{strong}\" style=\"--v:{strength:.2}\">{count}</td>");
            }
        }
        if guess + 1 == classes {
            html.push_str("</tr>\n");
        }
    }
    html.push_str("</tbody></table>\n");
}

fn confusion_image(html: &mut String, caption: &str, classes: usize, counts: &[u64]) {
    if classes > MAX_IMAGE {
        let _ = writeln!(html, "<p class=\"none\">{classes} classes are too many to draw.</p>");
        return;
    }
    // Middle tones with the strength as opacity: seen on light and on dark paper.
    let pixels: Vec<u8> = strengths(classes, counts)
        .flat_map(|(label, guess, _, strength)| {
            let [r, g, b] = if label == guess { [58, 128, 200] } else { [216, 96, 40] };
            [r, g, b, (strength * 255.0).round() as u8]
        })
        .collect();
    if let Some(uri) = png_uri(&pixels, classes, classes, ExtendedColorType::Rgba8) {
        let _ = writeln!(
            html,
            "<img class=\"heat\" alt=\"Confusion matrix of {classes} classes: {}\" src=\"{uri}\">",
            escape(caption)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(s: &str) -> String {
        s.into()
    }

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series { name: text(name), points: points.to_vec() }
    }

    fn chart_of(series: Vec<Series>) -> Section {
        Section::Chart {
            title: text("Loss"),
            x_label: text("step"),
            y_label: text("loss"),
            series,
            note: None,
        }
    }

    fn page(sections: Vec<Section>) -> String {
        render(&Page { title: text("T"), lead: text("L"), facts: vec![(text("a"), text("b/c"))], sections })
    }

    fn sample() -> Vec<Section> {
        vec![
            chart_of(vec![series("train", &[(0.0, 2.0), (1.0, 1.0), (2.0, 0.5)])]),
            Section::Bars {
                title: text("B"),
                bars: vec![(text("clean"), 0.931, text("93.1%"))],
                note: Some(text("N")),
            },
            Section::Confusions {
                title: text("C"),
                class_names: vec![text("cat"), text("dog")],
                matrices: vec![(text("before"), 2, vec![9, 1, 0, 10]), (text("after"), 13, vec![1; 169])],
            },
            Section::Strips {
                title: text("S"),
                strips: vec![Strip {
                    caption: text("worn"),
                    width: 2,
                    height: 1,
                    images: vec![vec![0, 255]],
                }],
            },
            Section::Table {
                title: text("T"),
                header: vec![text("h"), text("n")],
                rows: vec![vec![text("r"), text("1.5")]],
            },
        ]
    }

    #[test]
    fn every_text_is_escaped() {
        let evil = || text("<script>&\"'</script>\u{1}");
        let html = render(&Page {
            title: evil(),
            lead: evil(),
            facts: vec![(evil(), evil())],
            sections: vec![
                Section::Chart {
                    title: evil(),
                    x_label: evil(),
                    y_label: evil(),
                    series: vec![series(&evil(), &[(0.0, 1.0)])],
                    note: Some(evil()),
                },
                Section::Bars { title: evil(), bars: vec![(evil(), 0.5, evil())], note: Some(evil()) },
                Section::Confusions {
                    title: evil(),
                    class_names: vec![evil()],
                    matrices: vec![(evil(), 1, vec![3]), (evil(), 13, vec![0; 169])],
                },
                Section::Strips {
                    title: evil(),
                    strips: vec![Strip { caption: evil(), width: 1, height: 1, images: vec![vec![7]] }],
                },
                Section::Table { title: evil(), header: vec![evil()], rows: vec![vec![evil()]] },
            ],
        });
        assert!(!html.contains("<script"));
        assert!(!html.contains('\u{1}'));
        assert!(html.contains("<h1>&lt;script&gt;&amp;&quot;&#39;&lt;/script&gt;\u{fffd}</h1>"));
        assert!(html.contains("alt=\"&lt;script&gt;&amp;&quot;&#39;"));
    }

    #[test]
    fn a_page_holds_all_its_parts_and_loads_nothing() {
        let html = page(sample());
        for part in [
            "<title>T</title>",
            "b/<wbr>c",
            "width:93.10%",
            "<figcaption>N</figcaption>",
            "<th scope=\"row\">cat</th>",
        ] {
            assert!(html.contains(part), "{part}");
        }
        for (tag, count) in
            [("section", 5), ("figure", 5), ("svg", 2), ("table", 2), ("main", 1), ("html", 1)]
        {
            assert_eq!(html.matches(&format!("</{tag}>")).count(), count, "{tag}");
            assert_eq!(html.matches(&format!("<{tag}")).count(), count, "{tag}");
        }
        assert_eq!(html.matches("src=\"").count(), html.matches("src=\"data:image/png;base64,iVBOR").count());
        assert_eq!(html.matches("<img").count(), html.matches(" alt=\"").count());
        assert!(!html.contains("http://") && !html.contains("https://") && !html.contains("url("));
    }

    #[test]
    fn the_same_page_has_the_same_bytes() {
        assert_eq!(page(sample()), page(sample()));
    }

    #[test]
    fn points_that_are_not_finite_are_left_out() {
        let sound = [(0.0, 2.0), (1.0, 1.0)];
        let odd = [
            (0.0, 2.0),
            (0.5, f64::NAN),
            (f64::INFINITY, 1.0),
            (1.0, 1.0),
            (2.0, -f64::INFINITY),
            (3.0, f64::MAX),
        ];
        assert_eq!(
            page(vec![chart_of(vec![series("s", &sound)])]),
            page(vec![chart_of(vec![series("s", &odd)])])
        );
        let html = page(vec![chart_of(vec![series("a", &sound), series("b", &[(0.0, f64::NAN)])])]);
        assert!(html.contains("b (no finite points)") && !html.contains("NaN"));
        for none in [vec![], vec![series("a", &[])], vec![series("a", &[(f64::NAN, f64::NAN)])]] {
            assert!(page(vec![chart_of(none)]).contains("no finite points"));
        }
    }

    #[test]
    fn mismatched_input_leaves_a_remark() {
        let matrices = [(3, 4), (0, 0), (usize::MAX, 1), (2000, 4_000_000)]
            .map(|(n, len)| (text("m"), n, vec![1; len]))
            .to_vec();
        let images = vec![vec![], vec![1; 5], vec![1; 4]];
        let html = page(vec![
            Section::Confusions { title: text("C"), class_names: vec![], matrices },
            Section::Strips {
                title: text("S"),
                strips: vec![
                    Strip { caption: text("s"), width: 2, height: 2, images },
                    Strip { caption: text("s"), width: usize::MAX, height: 2, images: vec![vec![1]] },
                    Strip { caption: text("s"), width: 0, height: 0, images: vec![] },
                ],
            },
            Section::Bars {
                title: text("B"),
                bars: [f64::NAN, -1.0, 7.0].map(|v| (text("b"), v, text("v"))).to_vec(),
                note: None,
            },
            Section::Bars { title: text("B"), bars: vec![], note: None },
            Section::Table {
                title: text("T"),
                header: vec![],
                rows: vec![vec![], vec![text("a"), text("b")]],
            },
        ]);
        assert!(
            html.contains("4 counts do not fill 3 classes") && html.contains("2000 classes are too many")
        );
        assert_eq!(html.matches("<img").count(), 1);
        assert_eq!(html.matches("no image").count(), 3);
        assert!(html.contains("width:0.00%") && html.contains("width:100.00%") && !html.contains("NaN"));
        assert!(html.contains("no bars"));
    }

    #[test]
    fn counts_are_coloured_by_their_share_of_the_row() {
        let html = page(sample());
        assert!(html.contains(
            "<td class=\"hit strong\" style=\"--v:0.95\">9</td><td class=\"miss\" style=\"--v:0.32\">1</td>"
        ));
    }
}
