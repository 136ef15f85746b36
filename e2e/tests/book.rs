//! What the docs tell people to apply is accepted by an API server, and what they tell them to give to Helm by the chart.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::product::CHART;
use e2e::{Lab, Options, wait_until};

const SOON: Duration = Duration::from_secs(20);

/// Kinds of others, which this cluster does not know.
const OTHERS: [&str; 1] = ["projectcalico.org/"];

#[test]
fn manifests_and_helm_commands_of_the_docs_are_accepted() -> Result<()> {
    Lab::run(Options::one_node(), async |lab| {
        // The definitions alone: what is installed differently has selectors of its own, which cannot change.
        lab.kubectl(["apply", "--server-side", "-f", &format!("{CHART}/crds/")])
            .await?;
        for namespace in ["purelb", "purelb-system"] {
            lab.kubectl(["create", "namespace", namespace]).await?;
        }
        wait_until("the definitions are served", SOON, async || {
            lab.kubectl(["get", "sg,lbna", "-A"]).await
        })
        .await?;
        let (mut manifests, mut commands) = (0, 0);
        for page in pages()? {
            let text = std::fs::read_to_string(&page)?;
            for manifest in manifests_of(&text) {
                dry_run(&lab, &manifest)
                    .await
                    .with_context(|| format!("{} says to apply\n{manifest}", page.display()))?;
                manifests += 1;
            }
            for command in helm_commands_of(&text) {
                let rendered = lab.helm(template(&command)?).await;
                let rendered = rendered.with_context(|| format!("{} says {command}", page.display()))?;
                dry_run(&lab, &rendered)
                    .await
                    .with_context(|| format!("what {command} of {} installs", page.display()))?;
                commands += 1;
            }
        }
        println!("{manifests} manifests, {commands} commands");
        ensure!(
            manifests >= 5 && commands >= 8,
            "{manifests} manifests and {commands} commands are too few: are they found?"
        );
        Ok(())
    })
}

fn pages() -> Result<Vec<PathBuf>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut pages = vec![root.join("README.md"), root.join("charts/purelb/README.md")];
    for entry in std::fs::read_dir(root.join("docs"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path);
        }
    }
    pages.sort();
    Ok(pages)
}

/// The blocks of YAML that are whole objects, of kinds that this cluster knows.
fn manifests_of(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut block: Option<Vec<&str>> = None;
    for line in page.lines() {
        match &mut block {
            None if line == "```yaml" => block = Some(Vec::new()),
            None => {}
            Some(lines) if line == "```" => {
                let is_ours = |line: &&str| {
                    let version = line.strip_prefix("apiVersion: ");
                    version.is_some_and(|version| !OTHERS.iter().any(|other| version.starts_with(other)))
                };
                if lines.iter().any(is_ours) {
                    found.push(lines.join("\n"));
                }
                block = None;
            }
            Some(lines) => lines.push(line),
        }
    }
    found
}

/// The indented lines that begin with `helm install` or `helm upgrade`, with those they go on in.
fn helm_commands_of(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        let Some(line) = line.strip_prefix("    ") else {
            continue;
        };
        let mut command = line.trim().to_owned();
        let is_wanted = ["helm install ", "helm upgrade "]
            .iter()
            .any(|verb| command.starts_with(verb));
        if !(is_wanted && command.contains("charts/purelb")) {
            continue;
        }
        while let Some(part) = command.strip_suffix('\\') {
            command = format!("{} {}", part.trim_end(), lines.next().unwrap_or_default().trim());
        }
        found.push(command);
    }
    found
}

/// The command's values, for `helm template`.
fn template(command: &str) -> Result<Vec<String>> {
    let mut arguments = vec!["template".to_owned()];
    // No word of the docs has a blank in it: quotes are there for the shell's other characters.
    for word in command.split_whitespace().skip(2) {
        ensure!(
            word.matches('\'').count() % 2 == 0,
            "a quoted blank in {command} is not understood here"
        );
        let word = word.replace('\'', "");
        match word.as_str() {
            _ if word.ends_with("charts/purelb") => arguments.push(CHART.to_owned()),
            "--reuse-values" | "--reset-values" | "--take-ownership" => {}
            _ => arguments.push(word),
        }
    }
    arguments.push("--no-hooks".to_owned());
    Ok(arguments)
}

/// Has the API server look at manifests without keeping them.
async fn dry_run(lab: &Lab, manifests: &str) -> Result<String> {
    const FILE: &str = "/run/lab/manifests.yaml";
    std::fs::write(lab.outside(FILE), manifests)?;
    lab.kubectl(["apply", "--dry-run=server", "-f", FILE]).await
}
