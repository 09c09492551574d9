//! What the system says of this process, under the names that every exporter uses. Where there
//! is no `/proc` there are no such series.

use std::fs;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

pub(super) fn register(registry: &mut Registry) {
    registry.register_collector(Box::new(Process));
}

#[derive(Debug)]
struct Process;

/// In what `/proc` counts time: fixed in the kernel's interface.
const TICKS: f64 = 100.0;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut gauge = |name, help, unit: Option<&Unit>, value: Option<f64>| {
            let Some(value) = value else { return Ok(()) };
            let encoder = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
            ConstGauge::new(value).encode(encoder)
        };
        gauge(
            "process_resident_memory",
            "Memory that this process has in RAM.",
            Some(&Unit::Bytes),
            resident(),
        )?;
        gauge("process_open_fds", "Files and sockets that are open.", None, open_files())?;
        gauge("process_max_fds", "Files and sockets that may be open.", None, max_files())?;
        let (cpu, started) = times().unzip();
        gauge(
            "process_start_time",
            "When this process started, in Unix time.",
            Some(&Unit::Seconds),
            started.flatten(),
        )?;
        if let Some(cpu) = cpu {
            let encoder = encoder.encode_descriptor(
                "process_cpu",
                "Processor time used.",
                Some(&Unit::Seconds),
                MetricType::Counter,
            )?;
            ConstCounter::new(cpu).encode(encoder)?;
        }
        Ok(())
    }
}

fn resident() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024.0)
}

fn open_files() -> Option<f64> {
    // Less the one that this listing is read through.
    let open = fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1);
    u32::try_from(open).ok().map(f64::from)
}

fn max_files() -> Option<f64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    // The soft limit; a word where there is none.
    line.split_whitespace().next()?.parse().ok()
}

/// Processor time used, and when the process started.
fn times() -> Option<(f64, Option<f64>)> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The name before may contain anything, spaces and brackets included.
    let (_, fields) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split(' ').collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    let cpu = (field(14)? + field(15)?) / TICKS;
    let booted = || {
        let stat = fs::read_to_string("/proc/stat").ok()?;
        stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse::<f64>().ok()
    };
    Some((cpu, booted().zip(field(22)).map(|(booted, ticks)| booted + ticks / TICKS)))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn the_system_says_how_this_process_is() {
        assert!(resident().unwrap() > 1e6);
        let before = open_files().unwrap();
        let _files: Vec<_> = (0..64).map(|_| fs::File::open("/proc/self/stat").unwrap()).collect();
        // Other tests open and close files meanwhile.
        assert!(open_files().unwrap() > before + 20.0);
        assert!(max_files().unwrap() > open_files().unwrap());
        let (cpu, started) = times().unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - started.unwrap();
        assert!(cpu >= 0.0 && (-2.0..3_600.0).contains(&age), "{cpu}, started {age} s ago");
    }
}
