//! Tests of the guard itself on made-up crates, with forbidden uses in every form that compiles.

use std::collections::BTreeSet;

use super::{
    allowed::{faults, strays},
    cycles::cycles,
    rules::Row,
    source::{Crate, Target},
};

/// `low` may use nothing; `high` may use it and the outside crate `tracing`.
const ROWS: &[Row] = &[
    Row { module: "low", modules: "", outside: "" },
    Row { module: "high", modules: "low", outside: "" },
];

fn read(files: &[(&str, &str)]) -> Crate {
    let files: Vec<(String, String)> =
        files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
    let outside = ["tracing", "sled", "image"].map(str::to_owned);
    Crate::read(&files, &BTreeSet::from(outside))
}

/// The faults of a crate whose module `low` holds this code. `high` has a submodule and uses `low`,
/// which is allowed.
fn faults_of(low: &str) -> Vec<String> {
    let files = [
        ("lib.rs", "pub mod high; pub mod low;"),
        ("high/mod.rs", "pub mod inner; pub use crate::low::Thing; pub struct Own;"),
        ("high/inner.rs", "pub fn act() {}"),
        ("low.rs", low),
    ];
    faults(&read(&files), ROWS)
}

fn assert_found(code: &str, used: &str) {
    let faults = faults_of(code);
    let needed = format!("src/low.rs must not use {used} ");
    assert!(faults.iter().any(|fault| fault.starts_with(&needed)), "{code}\n{faults:?}");
}

#[test]
fn a_module_of_the_crate_is_found_however_it_is_named() {
    for code in [
        "use crate::high::Own;",
        "use crate::{high::Own};",
        "use crate::{high::{self, Own}};",
        "use crate::high;",
        "use crate::{self as root, high as other};",
        "use crate::high as other; fn f() { other::inner::act() }",
        "use crate::high::*;",
        "use crate::high::inner::{act as begin};",
        "use super::high::Own;",
        "use super::{high::inner};",
        "use self::super::high::Own;",
        "pub use crate::high::Own;",
        "pub(crate) use crate::{high::Own};",
        "fn f() { crate::high::inner::act() }",
        "fn f() { super::high::inner::act() }",
        "fn f(_: &crate::high::Own) {}",
        "fn f() -> Vec<crate::high::Own> { vec![] }",
        "type T = crate::high::Own;",
        "struct S { of: Option<super::high::Own> }",
        "impl From<crate::high::Own> for S {} struct S;",
        "fn f<T: crate::high::Own>() {}",
        "fn f() where u8: Into<crate::high::Own> {}",
        "fn f() { match 1 { crate::high::ONE => (), _ => () } }",
        "fn f() { use crate::high::inner; inner::act() }",
        "mod inner { use super::super::high::Own; }",
        "mod inner { fn f() { crate::high::inner::act() } }",
        "use crate as root; use root::high::Own;",
        "use crate as root; fn f() { root::high::inner::act() }",
        "use super::*; fn f() { high::inner::act() }",
        "fn f() { vec![crate::high::inner::act()] }",
        "fn f() { assert!(matches!(1, super::high::ONE)) }",
        "macro_rules! m { () => { $crate::high::inner::act() } }",
        "macro_rules! m { () => { use $crate::{high::inner}; } }",
        "#[derive(crate::high::Own)] struct S;",
        "#[cfg(unix)] use crate::high::Own;",
        "#[cfg(any(test, unix))] use crate::high::Own;",
        "#[cfg(not(test))] use crate::high::Own;",
        "use crate::r#high::Own;",
        "use oddscan::high::Own;",
        "const _: fn() = <u8 as crate::high::Own>::act;",
        "const _: u8 = <crate::high::Own>::ONE;",
    ] {
        assert_found(code, "high");
    }
}

#[test]
fn a_part_of_std_is_found_however_it_is_named() {
    for (code, used) in [
        ("use std::fs;", "std::fs"),
        ("use std::fs::File;", "std::fs"),
        ("use std::{fs, process};", "std::process"),
        ("use std::{io::{self, Read}, fs::{self, File as F}};", "std::fs"),
        ("use ::std::fs;", "std::fs"),
        ("use std::fs::*;", "std::fs"),
        ("use std::*;", "std::*"),
        ("use std as s; fn f() { s::fs::read(\"\") }", "std::*"),
        ("use std::{self};", "std::*"),
        ("extern crate std as s;", "std::*"),
        ("fn f() { std::fs::read(\"\") }", "std::fs"),
        ("fn f() { ::std::fs::read(\"\") }", "std::fs"),
        ("fn f() -> std::process::ExitCode { todo!() }", "std::process"),
        ("use std::time::{Duration, Instant}; fn f() { Instant::now() }", "std::time"),
        ("use std::time::Instant as I; fn f() -> I { <I>::now() }", "std::time"),
        ("type I = std::time::Instant; fn f() -> I { I::now() }", "std::time"),
        ("use std::time::SystemTime;", "std::time"),
        ("fn f(start: std::time::Instant) { start.elapsed() }", "std::time"),
        ("use std::time; fn f() { time::Instant::now() }", "std::time"),
        ("use core::time::*;", "std::time"),
        ("fn f() { std::thread::spawn(|| ()) }", "std::thread"),
        ("fn f() { vec![std::env::var(\"A\")] }", "std::env"),
        ("fn f() { vec![::std::env::var(\"A\")] }", "std::env"),
        ("macro_rules! m { () => { use std::{net, io}; } }", "std::net"),
        ("use std::io; fn f() { io::stdout() }", "std::io::stdout"),
        ("use std::io::*;", "std::io::stdin"),
        ("fn f(path: &std::path::Path) { path.is_file() }", "std::fs"),
        ("fn f() { println!(\"a\") }", "println!"),
        ("fn f() { std::eprintln!(\"a\") }", "eprintln!"),
        ("fn f() { vec![dbg!(1)] }", "dbg!"),
        ("include!(\"other.rs\");", "include!"),
    ] {
        assert_found(code, used);
    }
}

#[test]
fn an_outside_crate_is_found_however_it_is_named() {
    for code in [
        "use tracing::warn;",
        "use ::tracing::warn;",
        "use {tracing::{warn, info}};",
        "use tracing;",
        "use tracing as t;",
        "use tracing::*;",
        "pub use tracing::warn;",
        "extern crate tracing;",
        "extern crate tracing as t; fn f() { t::warn!(\"a\") }",
        "fn f() { tracing::warn!(\"a\") }",
        "fn f() { assert!(tracing::enabled()) }",
        "#[tracing::instrument] fn f() {}",
        "#[cfg_attr(unix, tracing::instrument)] fn f() {}",
        "fn f<T: tracing::Value>() {}",
    ] {
        assert_found(code, "tracing");
    }
}

#[test]
fn what_only_looks_like_a_use_is_none() {
    for code in [
        "// use crate::high::Own;\n/// [`crate::high`]\npub struct Thing;",
        "const A: &str = \"std::fs::read\";",
        "use std::{fmt, io::Read, path::Path, time::Duration};",
        "use std::time::Instant; fn f(now: Instant) { now.saturating_duration_since(now) }",
        "use std::io; fn f(_: io::Error) {}",
        "pub(in crate::low) struct Thing; pub(super) struct Other;",
        "mod tracing { pub fn warn() {} } fn f() { tracing::warn() }",
        "mod inner { pub struct A; } use inner::A; use self::inner as i;",
        "fn f(image: u8, sled: u8) -> u8 { image + sled }",
        "const N: usize = <[u8]>::len(&[]);",
        "macro_rules! m { ($a:ty) => { <$a>::tracing() } }",
        "#[cfg(test)] mod tests { use crate::high::Own; use std::fs; fn f() { println!(\"a\") } }",
        "#[cfg(test)] use std::fs;",
        "#[test] fn f() { std::fs::read(\"\") }",
        "struct S; impl S { #[cfg(test)] fn f() { std::fs::read(\"\") } }",
    ] {
        let all = faults_of(&format!("{code}\npub struct Thing;"));
        assert!(all.is_empty(), "{code}\n{all:?}");
    }
}

#[test]
fn tests_in_a_file_of_their_own_are_exempt_and_their_files_are_read() {
    let low = "#[cfg(test)] mod tests; pub struct Thing;";
    let high = ("high.rs", "use crate::low::Thing;");
    let of = |tests| faults(&read(&[("low/mod.rs", low), ("low/tests.rs", tests), high]), ROWS);
    assert!(of("use std::fs; use crate::high;").is_empty());
    assert!(std::panic::catch_unwind(|| of("use std::")).is_err(), "broken code must not pass");
}

#[test]
fn rows_are_complete_and_allow_no_more_than_is_used() {
    let low = ("low.rs", "pub struct Thing;");
    let all = faults(&read(&[low, ("high.rs", ""), ("new/mod.rs", "")]), ROWS);
    let needed = [
        "high does not use low: take it out of its row",
        "src/new/mod.rs has no row in tests/it/layers/rules.rs",
    ];
    assert_eq!(all, needed);
}

#[test]
fn a_thing_is_looked_for_where_it_is_declared() {
    let code = read(&[
        ("lib.rs", "mod a; mod b; mod c;"),
        ("a.rs", "pub use crate::b::Own as Other;"),
        ("b.rs", "pub struct Own;"),
        ("c.rs", "use crate::a::*; fn f() { Other::new() }"),
    ]);
    let of_c: Vec<_> = code.uses().into_iter().filter(|found| found.file == "c.rs").collect();
    let names = ["b", "Own", "new"].map(str::to_owned).to_vec();
    assert!(of_c.iter().any(|found| found.target == Target::Inside(names.clone())), "{of_c:?}");
}

#[test]
fn files_that_use_one_another_are_found_and_declarations_are_no_use() {
    let ways = |files: &[(&str, &str)]| -> Vec<String> {
        cycles(&read(files)).into_iter().map(|(_, way)| way).collect()
    };
    let tree = [
        ("lib.rs", "mod a;"),
        ("a/mod.rs", "mod one; mod two; pub use one::One; pub use two::Two;"),
        ("a/one.rs", "pub struct One;"),
        ("a/two.rs", "use super::One; #[cfg(test)] mod tests { use super::super::Two; }"),
    ];
    assert!(ways(&tree).is_empty(), "the parent only passes One on");
    let upwards = [
        ("lib.rs", "mod a;"),
        ("a/mod.rs", "mod one; fn f() { one::g() } struct Own;"),
        ("a/one.rs", "use super::Own;"),
    ];
    assert_eq!(ways(&upwards), ["a/mod.rs -> a/one.rs -> a/mod.rs"]);
    let round = [
        ("a.rs", "use crate::{b::B};"),
        ("b.rs", "fn f() { super::c::f() }"),
        ("c.rs", "struct S(crate::a::A);"),
        ("d.rs", "use crate::a::A;"),
    ];
    assert_eq!(ways(&round), ["a.rs -> b.rs -> c.rs -> a.rs"]);
}

#[test]
fn a_dependency_outside_of_its_home_is_found() {
    let code = read(&[
        ("store/sled.rs", "use sled::Tree;"),
        ("high.rs", "use {sled as s};"),
        ("low.rs", "fn f() { vec![sled::open()] }"),
    ]);
    let all = strays(&code);
    assert_eq!(all.len(), 2, "{all:?}");
    assert!(all[0].starts_with("src/high.rs names sled") && all[1].starts_with("src/low.rs"));
}
