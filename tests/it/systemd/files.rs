//! The files that systemd and dpkg read, in the eyes of systemd's own tools.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use pulsebus::config::{Inputs, load};

use crate::support::{daemon::BINARY, process};

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(file(path)).unwrap()
}

/// Runs one of systemd's tools; `None` where it is not installed (`tests/run` installs it).
fn run(tool: &str, build: impl FnOnce(&mut Command)) -> Option<Output> {
    let mut command = Command::new(tool);
    build(&mut command);
    match command.output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: {tool} is not installed");
            None
        }
        Err(error) => panic!("{tool}: {error}"),
    }
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// The unit in a folder of its own, started from where the binary under test is.
fn unit(change: impl FnOnce(String) -> String) -> PathBuf {
    let folder = process::folder("unit-file");
    let text = read("systemd/pulsebus.service").replace("/usr/bin/pulsebus", BINARY);
    fs::write(folder.join("pulsebus.service"), change(text)).unwrap();
    folder.join("pulsebus.service")
}

fn with_drop_in(unit: &Path) {
    let folder = unit.with_extension("service.d");
    fs::create_dir(&folder).unwrap();
    fs::copy(file("systemd/pulsebus.service.d/local.conf"), folder.join("local.conf")).unwrap();
}

fn verify(unit: &Path) -> Option<Output> {
    // The manual page is in the package.
    run("systemd-analyze", |command| {
        command.args(["verify", "--man=no"]).arg(unit);
    })
}

/// Whether the exposure is 1.5 or better; in tenths, as the option has it.
fn exposure(unit: &Path) -> Option<Output> {
    run("systemd-analyze", |command| {
        command.args(["security", "--offline=true", "--threshold=15", "--no-pager"]).arg(unit);
    })
}

#[test]
fn the_unit_and_the_drop_in_are_what_systemd_understands() {
    let plain = unit(|text| text);
    let Some(output) = verify(&plain) else { return };
    assert!(output.status.success() && said(&output).is_empty(), "{}", said(&output));
    with_drop_in(&plain);
    let output = verify(&plain).unwrap();
    assert!(output.status.success() && said(&output).is_empty(), "{}", said(&output));
    // And it would say so.
    let output = verify(&unit(|text| text.replace("WatchdogSec=", "WatchDogSec="))).unwrap();
    assert!(said(&output).contains("WatchDogSec"), "{}", said(&output));
    let wrong = unit(|text| text);
    with_drop_in(&wrong);
    let drop_in = wrong.with_extension("service.d").join("local.conf");
    fs::write(&drop_in, "[Service]\nLoadCredentials=x:/y\n").unwrap();
    let output = verify(&wrong).unwrap();
    assert!(
        said(&output).contains("LoadCredentials"),
        "the drop-in was not read: {}",
        said(&output)
    );
}

#[test]
fn the_unit_is_exposed_to_no_more_than_it_needs() {
    let Some(output) = exposure(&unit(|text| text)) else { return };
    assert!(output.status.success(), "{}", said(&output));
    let changed = unit(|text| text);
    with_drop_in(&changed);
    let output = exposure(&changed).unwrap();
    assert!(output.status.success(), "with the drop-in: {}", said(&output));
    // Without one of its walls it is not.
    let weaker = unit(|text| text.replace("SystemCallFilter=", "#").replace("PrivateUsers=", "#"));
    assert!(!exposure(&weaker).unwrap().status.success(), "the threshold does nothing");
}

#[test]
fn the_user_and_the_folders_can_be_made() {
    let root = process::folder("root");
    fs::create_dir_all(root.join("etc")).unwrap();
    let Some(output) = run("systemd-sysusers", |command| {
        command.arg("--root").arg(&root).arg(file("systemd/pulsebus.sysusers"));
    }) else {
        return;
    };
    assert!(output.status.success(), "{}", said(&output));
    let users = fs::read_to_string(root.join("etc/passwd")).unwrap();
    let user: Vec<&str> =
        users.lines().find(|l| l.starts_with("pulsebus:")).unwrap().split(':').collect();
    assert_eq!(user[5], "/var/lib/pulsebus");
    assert!(user[6].ends_with("nologin"), "{user:?}");
    if !process::is_root() {
        eprintln!("skipped: only root gives folders away");
        return;
    }
    let output = run("systemd-tmpfiles", |command| {
        command.arg("--create").arg("--root").arg(&root).arg(file("systemd/pulsebus.tmpfiles"));
    })
    .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let owner = |path: &str| {
        use std::os::unix::fs::MetadataExt as _;
        let metadata = fs::metadata(root.join(path)).unwrap();
        (metadata.uid(), metadata.mode() & 0o7777)
    };
    assert_eq!(owner("var/lib/pulsebus"), (user[2].parse().unwrap(), 0o700));
    assert_eq!(owner("etc/pulsebus"), (0, 0o755));
}

#[test]
fn the_package_has_what_the_unit_starts_and_every_file_is_there() {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let deb = manifest["package"]["metadata"]["deb"].as_table().unwrap();
    let assets: Vec<(&str, &str)> = deb["assets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|asset| (asset[0].as_str().unwrap(), asset[1].as_str().unwrap()))
        .collect();
    for (source, _) in &assets {
        // Made by packaging/build-deb, or a pattern.
        let there = source.starts_with("target/package/stage/") || source.contains('*');
        assert!(there || file(source).is_file(), "{source}");
    }
    let packaged = |path: &str| assets.iter().any(|(_, to)| *to == path.trim_start_matches('/'));
    let unit = read("systemd/pulsebus.service");
    for line in unit.lines().filter(|line| line.starts_with("ExecStart")) {
        let program = line.split_once('=').unwrap().1.split(' ').next().unwrap();
        assert!(packaged(program.trim_start_matches('-')), "{line}");
    }
    for file in deb["conf-files"].as_array().unwrap() {
        assert!(packaged(file.as_str().unwrap()), "{file}");
    }
    for script in ["postinst", "prerm", "postrm"] {
        let path = file("packaging/deb").join(script);
        assert!(Command::new("sh").arg("-n").arg(path).status().unwrap().success(), "{script}");
    }
}

#[test]
fn systemd_waits_for_longer_than_a_drain_takes() {
    let unit = read("systemd/pulsebus.service");
    let stop = unit.lines().find_map(|line| line.strip_prefix("TimeoutStopSec=")).unwrap();
    let stop = stop.strip_suffix('s').unwrap().parse().map(Duration::from_secs).unwrap();
    let settings = load(&Inputs::default()).unwrap().settings;
    assert!(stop >= settings.shutdown_timeout + Duration::from_secs(5), "{stop:?}");
}
