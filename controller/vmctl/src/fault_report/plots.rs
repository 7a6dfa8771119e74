//! Plots as SVG, drawn by hand: a page with them needs no script and nothing from elsewhere.

use std::fmt::Write as _;

use api::controller as pb;
use api::controller::fault_injection::Action;
use api::node::process_fault;

use super::junit::escape;
use super::{short, time};

const WIDTH: f64 = 1040.0;
const LEFT: f64 = 74.0;
const RIGHT: f64 = 16.0;
const LANE: f64 = 20.0;
/// Of faults, in their order; told apart by people who see fewer colours as well (Okabe and Ito).
const COLOURS: [&str; 7] = [
    "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7a00",
];

/// From milliseconds to a place on the time axis.
struct TimeAxis {
    end_ms: f64,
}

impl TimeAxis {
    fn x(&self, ms: f64) -> f64 {
        let share = (ms / self.end_ms).clamp(0.0, 1.0);
        LEFT + share * (WIDTH - LEFT - RIGHT)
    }

    /// Lines and numbers at round seconds.
    fn draw(&self, svg: &mut String, top: f64, bottom: f64) {
        let step = round_step(self.end_ms / 1000.0 / 10.0);
        let mut second = 0.0;
        while second * 1000.0 <= self.end_ms {
            let x = self.x(second * 1000.0);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"/>\
                 <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                bottom + 16.0,
                seconds(second),
            );
            second += step;
        }
    }
}

fn seconds(second: f64) -> String {
    match second.fract() == 0.0 {
        true => format!("{second:.0} s"),
        false => format!("{second:.1} s"),
    }
}

/// The next of 0.1, 0.2, 0.5, 1, 2, 5, 10 ...
fn round_step(least: f64) -> f64 {
    let mut step = 0.1;
    for factor in [2.0, 2.5, 2.0].into_iter().cycle() {
        if step >= least || step > 1e6 {
            break;
        }
        step *= factor;
    }
    step
}

/// From microseconds to a place on a logarithmic axis.
struct LogAxis {
    top: f64,
    bottom: f64,
    /// Powers of ten.
    from: f64,
    to: f64,
}

impl LogAxis {
    fn new(top: f64, bottom: f64, values: impl Iterator<Item = f64>) -> Self {
        let (mut least, mut most) = (f64::MAX, 0.0_f64);
        for value in values.filter(|value| *value > 0.0) {
            least = least.min(value);
            most = most.max(value);
        }
        if most == 0.0 {
            (least, most) = (10.0, 1000.0);
        }
        // From 100 ns to 1000 s, whatever somebody said.
        let from = least.log10().floor().clamp(-1.0, 8.0);
        let to = most.log10().ceil().clamp(from + 1.0, 9.0);
        Self {
            top,
            bottom,
            from,
            to,
        }
    }

    fn y(&self, us: f64) -> f64 {
        let share = (us.max(f64::MIN_POSITIVE).log10() - self.from) / (self.to - self.from);
        self.bottom - share.clamp(0.0, 1.0) * (self.bottom - self.top)
    }

    fn draw(&self, svg: &mut String) {
        let mut exponent = self.from;
        while exponent <= self.to {
            let us = 10f64.powf(exponent);
            let y = self.y(us);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 8.0,
                y + 4.0,
                time(us / 1000.0),
            );
            exponent += 1.0;
        }
    }
}

/// One line's samples: time, then p50, p99 and max in microseconds, and how many.
#[derive(Clone, Copy)]
struct Point {
    at_ms: f64,
    completed: u64,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
}

/// What the time line is about: guests' verifiers if they spoke, else the targets' daemons.
fn points(report: &pb::FaultReport) -> (Vec<Vec<Point>>, &'static str) {
    let guests: Vec<Vec<Point>> = report
        .guests
        .iter()
        .map(|guest| guest.samples.iter().map(Point::from).collect())
        .filter(|points: &Vec<Point>| !points.is_empty())
        .collect();
    if !guests.is_empty() {
        return (guests, "in the guest");
    }
    let devices = report.devices.iter().filter(|device| device.targeted);
    let devices = devices
        .map(|device| device.samples.iter().map(Point::from).collect())
        .collect();
    (devices, "in the daemons")
}

impl From<&pb::GuestSample> for Point {
    fn from(sample: &pb::GuestSample) -> Self {
        Self {
            at_ms: sample.at_ms,
            completed: sample.completed,
            p50_us: sample.latency_p50_us,
            p99_us: sample.latency_p99_us,
            max_us: sample.latency_max_us,
        }
    }
}

impl From<&pb::DeviceSample> for Point {
    fn from(sample: &pb::DeviceSample) -> Self {
        Self {
            at_ms: sample.at_ms,
            completed: sample.completed,
            p50_us: sample.latency_p50_us,
            p99_us: sample.latency_p99_us,
            max_us: sample.latency_max_us,
        }
    }
}

/// Latencies over time with outages, throughput beneath, and a lane for each fault.
pub(super) fn timeline(report: &pb::FaultReport) -> String {
    let (series, place) = points(report);
    let faults: Vec<&str> = fault_ids(report);
    let end_ms = end_ms(report, &series);
    let axis = TimeAxis { end_ms };
    let (top, bottom) = (28.0, 268.0);
    let (flow_top, flow_bottom) = (300.0, 360.0);
    let lanes_top = 392.0;
    let lanes_bottom = lanes_top + LANE * faults.len() as f64;
    let height = lanes_bottom + 34.0;
    let mut svg = open("timeline", height, "Latency over time, with faults");
    let all = series.iter().flatten();
    let latencies = LogAxis::new(
        top,
        bottom,
        all.flat_map(|p| [p.p50_us, p.p99_us, p.max_us]),
    );
    axis.draw(&mut svg, top, lanes_bottom);
    latencies.draw(&mut svg);
    for device in report.devices.iter().filter(|device| device.targeted) {
        for outage in &device.outages {
            draw_outage(&mut svg, &axis, device, outage, top, flow_bottom);
        }
    }
    for points in &series {
        for (class, value) in [
            ("max", (|p: &Point| p.max_us) as fn(&Point) -> f64),
            ("p99", |p: &Point| p.p99_us),
            ("p50", |p: &Point| p.p50_us),
        ] {
            draw_line(&mut svg, class, points, |p| {
                (value(p) > 0.0).then(|| (axis.x(p.at_ms), latencies.y(value(p))))
            });
        }
    }
    let _ = write!(
        svg,
        "<text class=\"label\" x=\"{LEFT}\" y=\"18\">Latency {place}</text>\
         <g class=\"key\" transform=\"translate({:.0} 18)\">{}</g>",
        WIDTH - 380.0,
        legend(),
    );
    draw_throughput(&mut svg, &axis, &series, flow_top, flow_bottom);
    for (lane, id) in faults.iter().enumerate() {
        let y = lanes_top + LANE * lane as f64;
        draw_lane(&mut svg, &axis, report, id, colour(lane), y);
    }
    svg.push_str("</svg>");
    svg
}

fn legend() -> String {
    let entries = [("p50", 0.0), ("p99", 80.0), ("max", 160.0)];
    let mut text: String = entries
        .iter()
        .map(|(name, x)| {
            format!(
                "<line class=\"line {name}\" x1=\"{x}\" x2=\"{}\" y1=\"-4\" y2=\"-4\"/>\
                 <text class=\"tick\" x=\"{}\" y=\"0\">{name}</text>",
                x + 24.0,
                x + 30.0
            )
        })
        .collect();
    text.push_str(
        "<rect class=\"outage\" x=\"240\" y=\"-11\" width=\"24\" height=\"12\"/>\
         <text class=\"tick\" x=\"270\" y=\"0\">no daemon</text>",
    );
    text
}

fn draw_outage(
    svg: &mut String,
    axis: &TimeAxis,
    device: &pb::DeviceReport,
    outage: &pb::Outage,
    top: f64,
    bottom: f64,
) {
    let ended_ms = match outage.ended_ms {
        0.0 => axis.end_ms,
        ended_ms => ended_ms,
    };
    let (from, to) = (axis.x(outage.began_ms), axis.x(ended_ms));
    let cause = match outage.fault.as_str() {
        "" => outage.cause.clone(),
        fault => format!("{fault}: {}", outage.cause),
    };
    let _ = write!(
        svg,
        "<rect class=\"outage\" x=\"{from:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\">\
         <title>{} of {} for {}, {} requests in flight ({})</title></rect>",
        (to - from).max(1.5),
        bottom - top,
        escape(&device.device),
        escape(short(&device.vm)),
        time(ended_ms - outage.began_ms),
        outage.in_flight,
        escape(&cause),
    );
}

/// A line through all points that are there; a gap where one is not.
fn draw_line(
    svg: &mut String,
    class: &str,
    points: &[Point],
    place: impl Fn(&Point) -> Option<(f64, f64)>,
) {
    let mut path = String::new();
    let mut pen_is_down = false;
    for point in points {
        match place(point) {
            Some((x, y)) => {
                let command = if pen_is_down { 'L' } else { 'M' };
                let _ = write!(path, "{command}{x:.1} {y:.1}");
                pen_is_down = true;
            }
            None => pen_is_down = false,
        }
    }
    if !path.is_empty() {
        let _ = write!(svg, "<path class=\"line {class}\" d=\"{path}\"/>");
    }
}

fn draw_throughput(
    svg: &mut String,
    axis: &TimeAxis,
    series: &[Vec<Point>],
    top: f64,
    bottom: f64,
) {
    let rates: Vec<Vec<Point>> = series.iter().map(|points| per_second(points)).collect();
    let most = rates.iter().flatten().map(|p| p.p50_us).fold(1.0, f64::max);
    let y = |rate: f64| bottom - (rate / most).clamp(0.0, 1.0) * (bottom - top);
    let _ = write!(
        svg,
        "<text class=\"label\" x=\"{LEFT}\" y=\"{:.1}\">Completed per second</text>\
         <line class=\"axis\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
         <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
         <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">0</text>",
        top - 8.0,
        WIDTH - RIGHT,
        LEFT - 8.0,
        top + 4.0,
        count(most),
        LEFT - 8.0,
        bottom + 4.0,
    );
    for points in &rates {
        draw_line(svg, "flow", points, |p| {
            Some((axis.x(p.at_ms), y(p.p50_us)))
        });
    }
}

/// Points whose p50 stands for a rate.
fn per_second(points: &[Point]) -> Vec<Point> {
    let pairs = points.windows(2);
    pairs
        .map(|pair| {
            let elapsed_s = ((pair[1].at_ms - pair[0].at_ms) / 1000.0).max(1e-3);
            Point {
                p50_us: pair[1].completed as f64 / elapsed_s,
                ..pair[1]
            }
        })
        .collect()
}

/// `12.3k`
fn count(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{:.1}M", value / 1e6),
        value if value >= 1e4 => format!("{:.0}k", value / 1e3),
        value if value >= 1e3 => format!("{:.1}k", value / 1e3),
        value => format!("{value:.0}"),
    }
}

/// A fault's beginnings as bars and its hits as marks.
fn draw_lane(
    svg: &mut String,
    axis: &TimeAxis,
    report: &pb::FaultReport,
    id: &str,
    colour: &str,
    y: f64,
) {
    let middle = y + LANE / 2.0;
    let _ = write!(
        svg,
        "<g class=\"lane\"><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
         <line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\"/>",
        LEFT - 8.0,
        middle + 4.0,
        escape(&shortened(id)),
        WIDTH - RIGHT,
    );
    let marks = report.marks.iter().filter(|mark| mark.id == id);
    let lasts = !is_instant(report, id);
    let mut begun = std::collections::VecDeque::new();
    for mark in marks {
        let x = axis.x(mark.at_ms);
        match mark.kind() {
            pb::FaultMarkKind::Begin => begun.push_back(x),
            pb::FaultMarkKind::End => {
                if let Some(from) = begun.pop_front().filter(|_| lasts) {
                    let _ = write!(
                        svg,
                        "<rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"8\" rx=\"2\" fill=\"{colour}\" opacity=\"0.28\"/>",
                        middle - 4.0,
                        (x - from).max(2.0),
                    );
                }
            }
            _ => {
                let _ = write!(
                    svg,
                    "<path class=\"hit\" d=\"M{x:.1} {:.1}v12\" stroke=\"{colour}\"><title>{} hit {} {} at {}</title></path>",
                    middle - 6.0,
                    escape(id),
                    escape(short(&mark.vm)),
                    escape(&mark.device),
                    time(mark.at_ms),
                );
            }
        }
    }
    svg.push_str("</g>");
}

/// A kill is over as soon as it is done.
fn is_instant(report: &pb::FaultReport, id: &str) -> bool {
    let spec = report
        .experiment
        .as_ref()
        .and_then(|experiment| experiment.spec.as_ref());
    let faults = spec.map_or(&[][..], |spec| &spec.faults);
    let fault = faults.iter().find(|fault| fault.id == id);
    match fault.and_then(|fault| fault.action.as_ref()) {
        Some(Action::Upgrade(_)) => true,
        Some(Action::Process(process)) => {
            matches!(process.action, Some(process_fault::Action::Kill(_)))
        }
        _ => false,
    }
}

fn shortened(id: &str) -> String {
    match id.len() > 10 {
        true => format!("{}\u{2026}", id.chars().take(9).collect::<String>()),
        false => id.to_owned(),
    }
}

fn colour(lane: usize) -> &'static str {
    COLOURS[lane % COLOURS.len()]
}

fn fault_ids(report: &pb::FaultReport) -> Vec<&str> {
    let experiment = report.experiment.as_ref();
    let spec = experiment.and_then(|experiment| experiment.spec.as_ref());
    let faults = spec.map_or(&[][..], |spec| &spec.faults);
    faults.iter().map(|fault| fault.id.as_str()).collect()
}

/// The right end of the time axis.
fn end_ms(report: &pb::FaultReport, series: &[Vec<Point>]) -> f64 {
    let samples = series.iter().flatten().map(|point| point.at_ms);
    let marks = report.marks.iter().map(|mark| mark.at_ms);
    let experiment = report.experiment.as_ref();
    let status = experiment.and_then(|experiment| experiment.status.as_ref());
    let elapsed = status.map_or(0.0, |status| f64::from(status.elapsed_ms));
    samples.chain(marks).fold(elapsed, f64::max).max(1000.0)
}

/// How long guests stood still, as bars.
pub(super) fn histogram(stalls: &pb::StallSummary, what: &str) -> String {
    let (top, bottom) = (30.0, 190.0);
    let mut svg = open("histogram", 232.0, "Stalls by their length");
    let _ = write!(
        svg,
        "<text class=\"label\" x=\"{LEFT}\" y=\"18\">{}</text>\
         <line class=\"axis\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{bottom}\" y2=\"{bottom}\"/>",
        escape(what),
        WIDTH - RIGHT
    );
    if stalls.buckets.is_empty() {
        let words = match stalls.count {
            0 => "no stall was measured",
            _ => "known in sum only",
        };
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"110\" text-anchor=\"middle\">{words}</text></svg>",
            WIDTH / 2.0
        );
        return svg;
    }
    let most = stalls.buckets.iter().map(|bucket| bucket.count).max();
    let most = most.unwrap_or(1).max(1) as f64;
    let slot = (WIDTH - LEFT - RIGHT) / stalls.buckets.len() as f64;
    let slot = slot.min(110.0);
    for (index, bucket) in stalls.buckets.iter().enumerate() {
        let x = LEFT + slot * index as f64 + slot * 0.1;
        let height = bucket.count as f64 / most * (bottom - top - 18.0);
        let bound = match bucket.up_to_ms < 1e9 {
            true => format!("\u{2264} {}", time(bucket.up_to_ms)),
            false => "more".to_owned(),
        };
        let _ = write!(
            svg,
            "<rect class=\"bar\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" rx=\"2\">\
             <title>{} stalls {bound}</title></rect>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{bound}</text>",
            bottom - height,
            slot * 0.8,
            bucket.count,
            x + slot * 0.4,
            bottom - height - 5.0,
            bucket.count,
            x + slot * 0.4,
            bottom + 17.0,
        );
    }
    svg.push_str("</svg>");
    svg
}

/// VMs by devices: what was aimed at, and what else was touched.
pub(super) fn matrix(report: &pb::FaultReport) -> String {
    let mut vms: Vec<&str> = report
        .devices
        .iter()
        .map(|device| device.vm.as_str())
        .collect();
    vms.dedup();
    let mut names: Vec<&str> = report
        .devices
        .iter()
        .map(|device| device.device.as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    let (left, top, row) = (150.0, 40.0, 44.0);
    let column = ((WIDTH - left - RIGHT) / names.len().max(1) as f64).min(190.0);
    let height = top + row * vms.len() as f64 + 12.0;
    let mut svg = open("matrix", height, "What was touched, VMs by devices");
    for (index, name) in names.iter().enumerate() {
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"26\" text-anchor=\"middle\">{}</text>",
            left + column * (index as f64 + 0.5),
            escape(name)
        );
    }
    for (line, vm) in vms.iter().enumerate() {
        let y = top + row * line as f64;
        let _ = write!(
            svg,
            "<text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left - 12.0,
            y + row / 2.0 + 2.0,
            escape(short(vm))
        );
        let devices = report.devices.iter().filter(|device| device.vm == *vm);
        for device in devices {
            let place = names.iter().position(|name| *name == device.device);
            let x = left + column * place.unwrap_or(0) as f64;
            draw_cell(&mut svg, device, x, y, column - 6.0, row - 6.0);
        }
    }
    svg.push_str("</svg>");
    svg
}

fn draw_cell(svg: &mut String, device: &pb::DeviceReport, x: f64, y: f64, width: f64, height: f64) {
    let lengths = device
        .outages
        .iter()
        .map(|outage| outage.ended_ms - outage.began_ms);
    let longest = lengths.fold(0.0, f64::max);
    let (class, words) = match (device.targeted, device.outages.len()) {
        (true, 0) => ("target", "target".to_owned()),
        (true, outages) => (
            "target",
            format!("{outages}\u{d7}, \u{2264} {}", time(longest)),
        ),
        (false, _) if device.touched.is_empty() => ("calm", "untouched".to_owned()),
        (false, _) => ("touched", "TOUCHED".to_owned()),
    };
    let detail = match device.touched.is_empty() {
        true => format!(
            "{} outages, {} errors, {} restarts",
            device.outages.len(),
            device.errors,
            device.restarts
        ),
        false => device.touched.clone(),
    };
    let _ = write!(
        svg,
        "<g class=\"cell {class}\"><rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"5\">\
         <title>{} of {}: {}</title></rect>\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{words}</text></g>",
        escape(&device.device),
        escape(short(&device.vm)),
        escape(&detail),
        x + width / 2.0,
        y + height / 2.0 + 4.5,
    );
}

fn open(id: &str, height: f64, label: &str) -> String {
    format!(
        "<svg id=\"{id}\" viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{label}\" xmlns=\"http://www.w3.org/2000/svg\">"
    )
}
