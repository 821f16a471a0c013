//! The files shipped with the binary describe it correctly: dashboard, alert rules, documents.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use oddscan::{
    domain::{
        DeviceMemory,
        damage::Damage,
        error::{QuarantineReason, Refusal},
        left_alone::LeftAlone,
        not_ready::NotReady,
        repair::Repair,
    },
    metrics::{
        DirectoryKind, EvictionReason, Fallback, IngestResult, MAX_COHORTS, Metrics, OutputKind,
        RescanTrigger, ScoreResult, SeenBy, Stage, Trigger, Verdict,
    },
};
use serde_json::{Value, json};

use crate::support::is_missing;

/// The folder that holds `Cargo.toml`.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The output of a command; panics with it if the command fails.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{command:?} failed:\n{said}");
    said
}

fn shipped(name: &str) -> String {
    fs::read_to_string(repository().join(name)).unwrap()
}

fn promtool(arguments: &[&str]) -> Command {
    let mut command = Command::new("promtool");
    command.current_dir(repository()).args(arguments);
    command
}

/// Metrics after one event of each kind, with more cohorts than can have their own labels.
fn exercised() -> Metrics {
    let metrics = Metrics::new();
    let second = Duration::from_secs(1);
    metrics.build_info("0.1.0", "abc1234", "cpu", "1");
    metrics.model_info("dinov2_vits14", "0123456789ab", "ba9876543210");
    metrics.ready(true);
    metrics.not_ready(NotReady::DiskLow, true);
    metrics.reload(true, 1_700_000_000);
    metrics.watchdog_notified();
    metrics.file_seen(SeenBy::Event);
    metrics.volume_ingested(IngestResult::Accepted);
    metrics.bytes_ingested(1_000_000);
    metrics.settled(second);
    metrics.rescan(RescanTrigger::Start);
    metrics.listed(1_700_000_000);
    metrics.quarantined(QuarantineReason::Truncated);
    metrics.quarantine_files(1);
    metrics.taken_back();
    metrics.left_alone(LeftAlone::Localiser, 3);
    let refusal =
        Refusal::new(QuarantineReason::Truncated, "10 bytes", "352 bytes", "export again");
    for &stage in Stage::ALL {
        metrics.queue(stage, 1, Some(1_700_000_000));
        metrics.stage_finished(stage, second);
        metrics.stage_failed(stage, &refusal.clone().into());
        metrics.stage_panicked(stage);
        metrics.stage_retried(stage);
    }
    metrics.end_to_end(second);
    for device in ["cuda:0", "cpu"] {
        metrics.encode_batch(device, 32);
        metrics.slices_encoded(device, 672);
        metrics.device_busy(device, second);
        let memory = DeviceMemory { used: 8_000_000_000, total: 16_000_000_000 };
        metrics.device_memory(device, (device != "cpu").then_some(memory));
    }
    metrics.encode_fallback(Fallback::Cpu);
    for cohort in 0..MAX_COHORTS + 2 {
        let cohort = format!("cohort_{cohort}");
        metrics.window(&cohort, [40, 1, 2], 8, 200, Some(1_700_000_000));
        metrics.window_contamination(&cohort, 0.2);
        metrics.window_hidden_follow_ups(&cohort, 2);
        metrics.window_rebuilding(&cohort, 1);
        metrics.window_likeness(&cohort, Some(1.04), Some(1.1));
        metrics.score_run(&cohort, ScoreResult::Ok, Trigger::NewScan, 1_700_000_000);
        metrics.pairs_computed(&cohort, 39);
        metrics.scan_percentile(&cohort, 0.5);
        Verdict::ALL.iter().for_each(|&verdict| metrics.verdict(&cohort, verdict));
    }
    for &kind in OutputKind::ALL {
        metrics.output_written(kind, true);
    }
    metrics.store_size(2_000_000, 1_000_000);
    metrics.store_repaired(Repair::StoreAside);
    metrics.store_compacted();
    metrics.evicted(EvictionReason::Window);
    metrics.found_damaged(Damage::Source, 1);
    for &directory in DirectoryKind::ALL {
        metrics.filesystem_avail(directory, Some(1_000_000_000));
    }
    metrics
}

/// One family of metrics as the page declares it.
#[derive(Default)]
struct Family {
    kind: String,
    help: String,
    /// Values that occur, by label; without the `le` of buckets.
    labels: BTreeMap<String, BTreeSet<String>>,
}

/// The families of a metrics page, by name.
fn families(page: &str) -> BTreeMap<String, Family> {
    let mut families = BTreeMap::<String, Family>::new();
    let mut current = String::new();
    for line in page.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|l| l.split_once(' ')) {
            current = name.to_owned();
            families.entry(current.clone()).or_default().help = help.to_owned();
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' '))
        {
            families.get_mut(name).unwrap().kind = kind.to_owned();
        } else {
            let family = families.get_mut(&current).unwrap();
            for (label, value) in labels_of(line) {
                family.labels.entry(label).or_default().insert(value);
            }
        }
    }
    families
}

/// Labels of one line of the page. Our label values hold neither commas nor quotes.
fn labels_of(line: &str) -> Vec<(String, String)> {
    let Some((_, rest)) = line.split_once('{') else { return Vec::new() };
    let (labels, _) = rest.split_once('}').unwrap();
    let pairs = labels.split(',').map(|pair| pair.split_once('=').unwrap());
    let pairs = pairs.filter(|(label, _)| *label != "le");
    pairs.map(|(label, value)| (label.to_owned(), value.trim_matches('"').to_owned())).collect()
}

/// Words of a text that are names of metrics, with the place after each.
fn metric_words(text: &str) -> Vec<(String, usize)> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut words = Vec::new();
    let mut start = None;
    for (place, c) in text.char_indices().chain([(text.len(), ' ')]) {
        match (start, is_word(c)) {
            (None, true) => start = Some(place),
            (Some(from), false) => {
                words.push((text[from..place].to_owned(), place));
                start = None;
            }
            _ => {}
        }
    }
    words.retain(|(word, _)| word.starts_with("oddscan_") || word.starts_with("process_"));
    words
}

/// Family of a series name: a histogram has three kinds of series.
fn family_of<'a>(name: &'a str, families: &BTreeMap<String, Family>) -> &'a str {
    let stem = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
    stem.filter(|stem| families.get(*stem).is_some_and(|f| f.kind == "histogram")).unwrap_or(name)
}

/// All panels that show something, without the rows.
fn panels(dashboard: &Value) -> Vec<&Value> {
    let panels = dashboard["panels"].as_array().unwrap();
    panels.iter().filter(|panel| panel["type"] != "row").collect()
}

fn dashboard() -> Value {
    serde_json::from_str(&shipped("dashboards/oddscan.json")).unwrap()
}

/// Every query of the dashboard with the title of its panel, those of annotations included.
fn queries(dashboard: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let mut queries = Vec::new();
    for panel in panels(dashboard) {
        for target in panel["targets"].as_array().unwrap() {
            queries.push((text(&panel["title"]), text(&target["expr"])));
        }
    }
    for annotation in dashboard["annotations"]["list"].as_array().unwrap() {
        if annotation["expr"].is_string() {
            queries.push((text(&annotation["name"]), text(&annotation["expr"])));
        }
    }
    queries
}

#[test]
fn prometheus_finds_no_fault_with_the_metrics_page() {
    if is_missing("promtool", "prometheus") {
        return;
    }
    for metrics in [Metrics::new(), exercised()] {
        let mut check = promtool(&["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        check.stdin.take().unwrap().write_all(metrics.render().as_bytes()).unwrap();
        let output = check.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && said.is_empty(), "promtool check metrics: {said}");
    }
}

#[test]
fn the_number_of_series_stays_bounded() {
    let page = exercised().render();
    let n_series = page.lines().filter(|line| !line.starts_with('#')).count();
    assert!(n_series < 2000, "{n_series} series with {MAX_COHORTS} cohorts");
}

#[test]
fn no_metric_can_name_a_person_or_a_file() {
    let known: BTreeSet<&str> = [
        "backend",
        "class",
        "cohort",
        "config_sha256_prefix",
        "device",
        "directory",
        "kind",
        "model",
        "reason",
        "repair",
        "result",
        "revision",
        "source",
        "stage",
        "state",
        "store_format",
        "to",
        "trigger",
        "version",
        "weights_sha256_prefix",
    ]
    .into();
    for (name, family) in families(&exercised().render()) {
        for label in family.labels.keys() {
            assert!(known.contains(label.as_str()), "{name} has the new label {label}");
        }
    }
}

#[test]
fn the_alert_rules_are_valid_and_do_what_their_tests_say() {
    if is_missing("promtool", "prometheus") {
        return;
    }
    run(&mut promtool(&["check", "rules", "dashboards/oddscan.rules.yml"]));
    run(&mut promtool(&["test", "rules", "dashboards/oddscan.rules_test.yml"]));
}

#[test]
fn every_alert_is_tested_and_has_a_runbook_and_every_runbook_an_alert() {
    let (rules, tests) =
        (shipped("dashboards/oddscan.rules.yml"), shipped("dashboards/oddscan.rules_test.yml"));
    let document = shipped("docs/operations.md");
    let after = |text: &str, prefix: &str| -> BTreeSet<String> {
        text.lines()
            .filter_map(|line| line.trim().strip_prefix(prefix))
            .map(str::to_owned)
            .collect()
    };
    let alerts = after(&rules, "- alert: ");
    assert!(alerts.len() > 10);
    assert_eq!(alerts, after(&tests, "alertname: "));
    assert_eq!(alerts, after(&document, "### "));

    let links = alerts.iter().map(|alert| format!("docs/operations.md#{}", alert.to_lowercase()));
    assert_eq!(links.collect::<BTreeSet<_>>(), after(&rules, "runbook_url: "));
}

#[test]
fn rules_and_dashboard_name_only_metrics_that_exist() {
    let families = families(&exercised().render());
    let dashboard = shipped("dashboards/oddscan.json");
    for (file, text) in [
        ("oddscan.rules.yml", shipped("dashboards/oddscan.rules.yml")),
        ("oddscan.rules_test.yml", shipped("dashboards/oddscan.rules_test.yml")),
        ("oddscan.json", dashboard),
    ] {
        for (name, _) in metric_words(&text) {
            assert!(families.contains_key(family_of(&name, &families)), "{file} names {name}");
        }
    }
}

#[test]
fn every_metric_of_ours_is_on_the_dashboard() {
    let families = families(&exercised().render());
    let queries = queries(&dashboard());
    let words = queries.iter().flat_map(|(_, query)| metric_words(query));
    let shown: BTreeSet<_> =
        words.map(|(name, _)| family_of(&name, &families).to_owned()).collect();
    for name in families.keys().filter(|name| name.starts_with("oddscan_")) {
        assert!(shown.contains(name), "no panel shows {name}");
    }
}

/// Prometheus's own parser reads each query, as the expression of a rule.
#[test]
fn every_query_of_the_dashboard_is_valid() {
    if is_missing("promtool", "prometheus") {
        return;
    }
    let rules: Vec<Value> = queries(&dashboard())
        .into_iter()
        .enumerate()
        .map(|(index, (_, query))| {
            let query = query.replace("$__rate_interval", "5m").replace("$__range", "1h");
            json!({ "record": format!("query:{index}"), "expr": query })
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("queries.yml");
    // JSON is YAML.
    let groups = json!({ "groups": [{ "name": "dashboard", "rules": rules }] });
    fs::write(&file, groups.to_string()).unwrap();
    run(&mut promtool(&["check", "rules", file.to_str().unwrap()]));
}

/// The rules that grafana/dashboard-linter publishes for panels.
#[test]
fn every_panel_says_what_it_shows_in_which_unit_from_which_source() {
    let dashboard = dashboard();
    let mut titles = BTreeSet::new();
    for panel in panels(&dashboard) {
        let title = panel["title"].as_str().unwrap();
        assert!(titles.insert(title), "two panels are called {title}");
        let description = panel["description"].as_str().unwrap_or_default();
        assert!(!title.is_empty() && description.ends_with('.'), "{title}: no description");
        let unit = panel["fieldConfig"]["defaults"]["unit"].as_str().unwrap_or_default();
        assert!(!unit.is_empty(), "{title}: no unit");
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{title}: no query");
        for owner in targets.iter().chain([panel]) {
            assert_eq!(owner["datasource"]["uid"], "${datasource}", "{title}");
        }
        for target in targets {
            assert!(!target["legendFormat"].as_str().unwrap().is_empty(), "{title}: no legend");
        }
    }
}

#[test]
fn every_query_asks_only_for_the_chosen_job_and_instance() {
    for (title, query) in queries(&dashboard()) {
        for (name, end) in metric_words(&query) {
            let chosen = "{job=~\"$job\", instance=~\"$instance\"";
            assert!(query[end..].starts_with(chosen), "{title}: {name} lacks {chosen}");
        }
    }
}

#[test]
fn every_counter_is_a_rate_over_an_interval_that_grafana_chooses() {
    for (title, query) in queries(&dashboard()) {
        for (name, end) in metric_words(&query) {
            let after = query[end..].split_once('}').unwrap().1;
            let is_counter = name.ends_with("_total") || name.ends_with("_bucket");
            assert!(!is_counter || after.starts_with('['), "{title}: {name} without a rate");
        }
        for (open, _) in query.match_indices('[') {
            let interval = query[open + 1..].split(']').next().unwrap();
            let before = &query[..query[..open].rfind('(').unwrap()];
            let function =
                before.rsplit(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
            let is_fit = match function {
                // A total over the time in view, as one number.
                "increase" => ["$__rate_interval", "$__range"].contains(&interval),
                // A forecast looks back as far as the alert does.
                "predict_linear" => interval == "6h",
                _ => interval == "$__rate_interval",
            };
            assert!(is_fit, "{title}: {function} over {interval}");
        }
    }
}

/// The rules that grafana/dashboard-linter publishes for the dashboard as a whole.
#[test]
fn the_dashboard_asks_for_its_source_job_and_instance_and_cannot_be_edited_by_accident() {
    let dashboard = dashboard();
    assert_eq!(dashboard["editable"], false);
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let labels: Vec<_> = variables
        .iter()
        .map(|v| (v["name"].as_str().unwrap(), v["label"].as_str().unwrap()))
        .collect();
    let expected = [
        ("datasource", "Data source"),
        ("job", "Job"),
        ("instance", "Instance"),
        ("cohort", "Cohort"),
    ];
    assert_eq!(labels, expected);
    assert_eq!(variables[0]["type"], "datasource");
    assert_eq!(variables[0]["query"], "prometheus");
    let families = families(&exercised().render());
    for variable in &variables[1..] {
        let name = &variable["name"];
        assert_eq!(variable["datasource"]["uid"], "${datasource}", "{name}");
        // 2: asked again when the time range changes.
        assert_eq!(variable["refresh"], 2, "{name}");
        assert_eq!(variable["multi"], true, "{name}");
        assert_eq!(variable["allValue"], ".+", "{name}");
        let query = variable["definition"].as_str().unwrap();
        assert_eq!(variable["query"]["query"], query, "{name}");
        let (metric, _) = &metric_words(query)[0];
        assert!(families.contains_key(metric), "{name} asks for {metric}");
    }
}

#[test]
fn panels_have_numbers_of_their_own_and_do_not_overlap() {
    let dashboard = dashboard();
    let mut ids = BTreeSet::new();
    let mut cells = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()));
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap());
        assert!(x + w <= 24, "{} is wider than the page", panel["title"]);
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(cells.insert(cell), "{} lies over another panel", panel["title"]);
        }
    }
}

/// The reference table as the code has it.
fn reference() -> String {
    // The values of a label are a fixed set if they are on the page before anything happened.
    let at_start = families(&Metrics::new().render());
    let mut table = "| metric | type | labels | meaning |\n|---|---|---|---|\n".to_owned();
    for (name, family) in families(&exercised().render()) {
        let values_at_start = at_start.get(&name).map(|family| &family.labels);
        let label = |label: &String| {
            let values = values_at_start.and_then(|labels| labels.get(label));
            match values.filter(|_| label != "cohort") {
                Some(values) => {
                    let values: Vec<_> = values.iter().map(String::as_str).collect();
                    format!("`{label}` = {}", values.join(", "))
                }
                None => format!("`{label}`"),
            }
        };
        let labels: Vec<_> = family.labels.keys().map(label).collect();
        let Family { kind, help, .. } = family;
        table += &format!("| `{name}` | {kind} | {} | {help} |\n", labels.join("; "));
    }
    table
}

/// With `ODDSCAN_BLESS` in the environment the document is written instead of compared.
#[test]
fn the_metric_reference_is_what_the_code_exports() {
    const BEGIN: &str = "<!-- metrics: begin -->\n";
    const END: &str = "<!-- metrics: end -->";
    let path: PathBuf = repository().join("docs/operations.md");
    let document = fs::read_to_string(&path).unwrap();
    let (head, rest) = document.split_once(BEGIN).unwrap();
    let (table, tail) = rest.split_once(END).unwrap();
    if env::var_os("ODDSCAN_BLESS").is_some() {
        fs::write(&path, [head, BEGIN, &reference(), END, tail].concat()).unwrap();
    } else {
        assert_eq!(table, reference(), "write it anew with ODDSCAN_BLESS=1");
    }
}

#[test]
fn the_scrape_configuration_of_the_document_is_valid() {
    if is_missing("promtool", "prometheus") {
        return;
    }
    let document = shipped("docs/operations.md");
    let (_, rest) = document.split_once("```yaml\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("prometheus.yml"), example).unwrap();
    fs::copy(
        repository().join("dashboards/oddscan.rules.yml"),
        folder.path().join("oddscan.rules.yml"),
    )
    .unwrap();
    run(promtool(&["check", "config", "prometheus.yml"]).current_dir(folder.path()));
}
