//! The kinds of picture that examples and benches draw, as PNG files.
//!
//! The typeface is compiled in (DejaVu Sans, from the `dejavu` crate), so that the pictures come out
//! the same on a machine without fonts.
#![allow(dead_code, reason = "each example and bench that includes this file draws some of them")]

use std::{error::Error, ops::Range, path::Path};

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

type Canvas<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Chart<'a, X, Y> = ChartContext<
    'a,
    BitMapBackend<'a>,
    Cartesian2d<<X as AsRangedCoord>::CoordDescType, <Y as AsRangedCoord>::CoordDescType>,
>;
type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The colours of Okabe and Ito: they can be told apart with any kind of colour vision.
const PALETTE: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
const FAMILY: &str = "sans-serif";
const WIDTH: i32 = 1200;
const TITLE_SIZE: i32 = 28;
const TEXT_SIZE: i32 = 19;
const MARGIN: i32 = 20;

/// One line of a line chart.
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// Draws every series as a line over common axes, with a legend at the top right.
///
/// The first line is broad, so that it still shows where another covers it.
pub fn line_chart(
    path: &Path,
    title: &str,
    x_label: &str,
    y_label: &str,
    series: &[Series],
) -> Result<()> {
    let x = span(series, |&(x, _)| x)?;
    let y = span(series, |&(_, y)| y)?;
    let padding = 0.04 * (y.end - y.start);
    let y = y.start - padding..y.end + padding;
    let corner = SeriesLabelPosition::UpperRight;
    plot(path, title, (x_label, x), (y_label, y), corner, |chart| {
        for (index, line) in series.iter().enumerate() {
            let style = PALETTE[index % PALETTE.len()].stroke_width(if index == 0 { 5 } else { 2 });
            chart
                .draw_series(LineSeries::new(line.points.iter().copied(), style))?
                .label(&line.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
        }
        Ok(())
    })
}

/// Draws each pair of series as lines of one colour, the second of them thin and with rings, against
/// powers of two. A series may be empty.
pub fn pair_chart(
    path: &Path,
    title: &str,
    x_label: &str,
    y_label: &str,
    pairs: &[[Series; 2]],
) -> Result<()> {
    let x = span(pairs.as_flattened(), |&(x, _)| x)?;
    let y = span(pairs.as_flattened(), |&(_, y)| y)?;
    let x = (x.start / 1.1..x.end * 1.1).log_scale().base(2.0);
    let y = 0.0..1.05 * y.end;
    plot(path, title, (x_label, x), (y_label, y), SeriesLabelPosition::LowerRight, |chart| {
        for (pair, color) in pairs.iter().zip(PALETTE.iter().cycle()) {
            for (line, second) in pair.iter().zip([false, true]) {
                if line.points.is_empty() {
                    continue;
                }
                let style = color.stroke_width(if second { 1 } else { 4 });
                let dot = if second { (6, color.stroke_width(2)) } else { (4, color.filled()) };
                let points = || line.points.iter().copied();
                chart.draw_series(points().map(|p| Circle::new(p, dot.0, dot.1)))?;
                chart
                    .draw_series(LineSeries::new(points(), style))?
                    .label(&line.name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
            }
        }
        Ok(())
    })
}

/// Draws each series as a line with dots on logarithmic axes, the first one along powers of two. A series may be empty.
pub fn log_chart(
    path: &Path,
    title: &str,
    x_label: &str,
    y_label: &str,
    series: &[Series],
) -> Result<()> {
    let [x, y] = [span(series, |&(x, _)| x)?, span(series, |&(_, y)| y)?];
    if x.start <= 0.0 || y.start <= 0.0 {
        return Err(format!("the chart {title:?} has a point off a logarithmic axis").into());
    }
    let x = (x.start / 1.1..x.end * 1.1).log_scale().base(2.0);
    let y = (y.start / 1.3..y.end * 1.3).log_scale();
    plot(path, title, (x_label, x), (y_label, y), SeriesLabelPosition::UpperLeft, |chart| {
        for (line, color) in series.iter().zip(PALETTE.iter().cycle()) {
            if line.points.is_empty() {
                continue;
            }
            let style = color.stroke_width(3);
            let points = || line.points.iter().copied();
            chart.draw_series(points().map(|p| Circle::new(p, 4, color.filled())))?;
            chart
                .draw_series(LineSeries::new(points(), style))?
                .label(&line.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
        }
        Ok(())
    })
}

/// Draws each series as points of (FLOP a byte, TFLOP/s) on logarithmic axes, under the roofs that
/// the memory (TB/s) and the arithmetic (TFLOP/s) set.
pub fn roofline(
    path: &Path,
    title: &str,
    (memory, arithmetic): (f64, f64),
    series: &[Series],
) -> Result<()> {
    let points = || series.iter().flat_map(|series| &series.points);
    if points().any(|&(x, y)| !(x > 0.0 && y > 0.0 && x.is_finite() && y.is_finite())) {
        return Err(format!("the roofline {title:?} has a point off a logarithmic axis").into());
    }
    let ridge = arithmetic / memory;
    let left = points().map(|p| p.0).fold(ridge, f64::min) / 1.5;
    let right = points().map(|p| p.0).fold(ridge, f64::max) * 1.5;
    let bottom = points().map(|p| p.1).fold(memory * left, f64::min) / 1.5;
    let top = points().map(|p| p.1).fold(arithmetic, f64::max) * 1.5;

    let x = ("FLOP a byte of operands and result", (left..right).log_scale());
    let y = ("TFLOP/s", (bottom..top).log_scale());
    plot(path, title, x, y, SeriesLabelPosition::LowerRight, |chart| {
        let roofs = [(left, memory * left), (ridge, arithmetic), (right, arithmetic)];
        let style = BLACK.mix(0.6).stroke_width(2);
        chart
            .draw_series(LineSeries::new(roofs, style))?
            .label(format!("{} TB/s, {} TFLOP/s", short_number(&memory), short_number(&arithmetic)))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
        for (index, series) in series.iter().enumerate() {
            // Rings around the first series' dots: neither hides the other.
            let color = PALETTE[index % PALETTE.len()];
            let (radius, style) =
                if index == 0 { (4, color.filled()) } else { (7, color.stroke_width(2)) };
            chart
                .draw_series(series.points.iter().map(|&p| Circle::new(p, radius, style)))?
                .label(&series.name)
                .legend(move |(x, y)| Circle::new((x + 11, y), radius, style));
        }
        Ok(())
    })
}

/// Labelled axes with a grid, what `draw` puts on them, and the legend.
fn plot<'a, X, Y>(
    path: &'a Path,
    title: &str,
    (x_label, x): (&str, X),
    (y_label, y): (&str, Y),
    legend: SeriesLabelPosition,
    draw: impl FnOnce(&mut Chart<'a, X, Y>) -> Result<()>,
) -> Result<()>
where
    X: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
    Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
{
    let canvas = canvas(path, 740)?;
    let mut chart = ChartBuilder::on(&canvas)
        .caption(title, (FAMILY, TITLE_SIZE))
        .margin(MARGIN)
        .x_label_area_size(56)
        .y_label_area_size(76)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(BLACK.mix(0.5))
        .label_style((FAMILY, TEXT_SIZE))
        .x_label_formatter(&short_number)
        .y_label_formatter(&short_number)
        .x_desc(x_label)
        .y_desc(y_label)
        .draw()?;
    draw(&mut chart)?;
    chart
        .configure_series_labels()
        .position(legend)
        .margin(12)
        .label_font((FAMILY, TEXT_SIZE))
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.2))
        .draw()?;
    Ok(canvas.present()?)
}

/// Draws one group of horizontal bars for each `(label, bars)`, where a bar is a series' name and
/// its value in `unit`.
///
/// Bars start at zero. A series keeps its colour through all groups and need not be in every one.
pub fn bar_chart(
    path: &Path,
    title: &str,
    unit: &str,
    groups: &[(String, Vec<(String, f64)>)],
) -> Result<()> {
    const BAR: i32 = 28;
    const GROUP_GAP: i32 = 18;

    let bars = || groups.iter().flat_map(|(_, bars)| bars);
    let largest = bars().map(|&(_, value)| value).fold(0.0, f64::max);
    if !(largest > 0.0 && largest.is_finite()) {
        return Err(format!("the bar chart {title:?} has no positive finite value").into());
    }
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in bars() {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }

    let top = MARGIN + TITLE_SIZE + 2 * TEXT_SIZE + MARGIN;
    let height = top + BAR * bars().count() as i32 + GROUP_GAP * groups.len() as i32 + MARGIN;
    let canvas = canvas(path, height)?;
    let text = text_style(TEXT_SIZE, HPos::Left);
    let text_width =
        |label: &str| -> Result<i32> { Ok(canvas.estimate_text_size(label, &text)?.0 as i32) };

    canvas.draw_text(
        title,
        &text_style(TITLE_SIZE, HPos::Left),
        (MARGIN, MARGIN + TITLE_SIZE / 2),
    )?;
    let legend_y = MARGIN + TITLE_SIZE + TEXT_SIZE;
    let mut x = MARGIN;
    for (name, color) in names.iter().zip(PALETTE.iter().cycle()) {
        canvas
            .draw(&Rectangle::new([(x, legend_y - 6), (x + 12, legend_y + 6)], color.filled()))?;
        canvas.draw_text(name, &text, (x + 18, legend_y))?;
        x += 18 + text_width(name)? + 24;
    }
    canvas.draw_text(unit, &text_style(TEXT_SIZE, HPos::Right), (WIDTH - MARGIN, legend_y))?;

    let mut left = 0;
    for (label, _) in groups {
        left = left.max(text_width(label)?);
    }
    let left = MARGIN + left + 12;
    let room_for_value = text_width(&short_number(&largest))? + 16;
    let pixels_per_unit = f64::from(WIDTH - left - room_for_value - MARGIN) / largest;

    let mut y = top;
    for (label, bars) in groups {
        let middle = y + BAR * bars.len() as i32 / 2;
        canvas.draw_text(label, &text_style(TEXT_SIZE, HPos::Right), (left - 12, middle))?;
        for (name, value) in bars {
            let series = names.iter().position(|known| known == name).unwrap_or_default();
            let end = left + (value * pixels_per_unit) as i32;
            let color = PALETTE[series % PALETTE.len()];
            canvas.draw(&Rectangle::new([(left, y + 1), (end, y + BAR - 2)], color.filled()))?;
            canvas.draw_text(&short_number(value), &text, (end + 8, y + BAR / 2))?;
            y += BAR;
        }
        y += GROUP_GAP;
    }
    canvas.draw(&PathElement::new([(left, top - 4), (left, y - GROUP_GAP + 4)], BLACK.mix(0.5)))?;
    Ok(canvas.present()?)
}

fn canvas(path: &Path, height: i32) -> Result<Canvas<'_>> {
    register_font(FAMILY, FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| "the compiled-in typeface cannot be read")?;
    let canvas = BitMapBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    canvas.fill(&WHITE)?;
    Ok(canvas)
}

/// Text anchored at the middle of its height.
fn text_style(size: i32, anchor: HPos) -> TextStyle<'static> {
    TextStyle::from((FAMILY, size)).pos(Pos::new(anchor, VPos::Center))
}

/// The range that one coordinate of all points covers; an axis cannot be scaled to a range that is
/// empty or not finite.
fn span(series: &[Series], coordinate: impl Fn(&(f64, f64)) -> f64) -> Result<Range<f64>> {
    let values = || series.iter().flat_map(|line| &line.points).map(&coordinate);
    let low = values().fold(f64::INFINITY, f64::min);
    let high = values().fold(f64::NEG_INFINITY, f64::max);
    if low >= high || values().any(|value| !value.is_finite()) {
        return Err(format!("cannot draw an axis from {low} to {high}").into());
    }
    Ok(low..high)
}

/// About three significant digits, without an exponent or zeros that say nothing.
fn short_number(value: &f64) -> String {
    let decimals = match value.abs() {
        v if v >= 100.0 => return format!("{value:.0}"),
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
