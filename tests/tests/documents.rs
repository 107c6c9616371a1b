//! Tests of the documents: links lead somewhere, pages keep their form, and commands can be typed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bootstrap::cli::Cli;
use bootstrap::config::Config;
use clap::Parser;
use harness::architecture::top;

/// A Markdown file.
struct Document {
    /// The path from the repository's top, such as `docs/aws.md`.
    path: String,
    text: String,
}

/// Returns all Markdown files of the repository.
fn documents() -> Vec<Document> {
    let mut folders = vec![top().to_owned()];
    let mut all = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            // A build folder may lie anywhere. Cargo marks it.
            if name.starts_with('.') || name == "target" || path.join("CACHEDIR.TAG").exists() {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if name.ends_with(".md") {
                let text = fs::read_to_string(&path).unwrap();
                all.push(Document { path: path.strip_prefix(top()).unwrap().to_str().unwrap().to_owned(), text });
            }
        }
    }
    assert!(all.len() > 10, "too few documents were found");
    all
}

impl Document {
    /// Returns the lines outside code blocks, without the code within them.
    fn prose(&self) -> Vec<String> {
        let mut is_code = false;
        let mut prose = Vec::new();
        for line in self.text.lines() {
            if line.trim_start().starts_with("```") {
                is_code = !is_code;
            } else if !is_code {
                prose.push(line.split('`').step_by(2).collect::<Vec<_>>().join("`"));
            }
        }
        assert!(!is_code, "{}: a code block has no end", self.path);
        prose
    }

    /// Returns the targets of the links.
    fn links(&self) -> Vec<String> {
        let prose = self.prose().join("\n");
        prose.split("](").skip(1).map(|rest| rest.split(')').next().unwrap().to_owned()).collect()
    }

    /// Returns the anchors of the headings, as GitHub makes them.
    fn anchors(&self) -> Vec<String> {
        let mut is_code = false;
        let mut seen = BTreeMap::new();
        let mut anchors = Vec::new();
        for line in self.text.lines() {
            is_code ^= line.trim_start().starts_with("```");
            let heading = line.trim_start_matches('#');
            if is_code || !line.starts_with('#') || !heading.starts_with(' ') {
                continue;
            }
            let kept = heading.trim().to_lowercase();
            let kept = kept.chars().filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter));
            let anchor: String = kept.map(|letter| if letter == ' ' { '-' } else { letter }).collect();
            let count = seen.entry(anchor.clone()).and_modify(|count| *count += 1).or_insert(0);
            anchors.push(if *count == 0 { anchor } else { format!("{anchor}-{count}") });
        }
        anchors
    }

    /// Returns the commands of the `sh` blocks: one line each, without comments.
    fn commands(&self) -> Vec<String> {
        let mut commands = Vec::new();
        for block in self.text.split("```sh\n").skip(1) {
            let block = block.split("```").next().unwrap().replace("\\\n", " ");
            commands.extend(block.lines().map(|line| line.split(" #").next().unwrap().trim().to_owned()));
        }
        commands
    }
}

/// Returns why a link of this document leads nowhere, if it does.
fn broken(document: &Document, link: &str, all: &[Document]) -> Option<String> {
    if link.contains("://") {
        return None;
    }
    let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
    let folder = Path::new(&document.path).parent().unwrap();
    let target = match path {
        "" => PathBuf::from(&document.path),
        path => normal(&folder.join(path)),
    };
    if !top().join(&target).exists() {
        return Some(format!("{} links to {link}, which does not exist", document.path));
    }
    let anchor = anchor?;
    let found = all.iter().find(|other| Path::new(&other.path) == target);
    match found.is_some_and(|found| found.anchors().iter().any(|known| known == anchor)) {
        true => None,
        false => Some(format!("{} links to {link}, and that page has no such heading", document.path)),
    }
}

/// Resolves `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => assert!(normal.pop(), "{} leaves the repository", path.display()),
            part => normal.push(part),
        }
    }
    normal
}

#[test]
fn every_link_and_anchor_leads_somewhere() {
    let all = documents();
    let links: Vec<_> =
        all.iter().flat_map(|document| document.links().into_iter().map(move |link| (document, link))).collect();
    assert!(links.len() > 20, "{}", links.len());
    let broken: Vec<_> = links.iter().filter_map(|(document, link)| broken(document, link, &all)).collect();
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// Links that lead nowhere are found, in all their forms.
#[test]
fn planted_broken_links_are_found() {
    let text = "# A page\n\n## Keys, and `code`\n\n## Twice\n## Twice\n[a](b.md#x)\n`[not](a-link)`\n```sh\n# [no](link)\n```\n";
    let page = |path: &str| Document { path: path.into(), text: text.into() };
    let all = [page("docs/page.md")];
    assert_eq!(all[0].links(), ["b.md#x"]);
    assert_eq!(all[0].anchors(), ["a-page", "keys-and-code", "twice", "twice-1"]);
    for link in ["nowhere.md", "../nowhere.md", "#nowhere", "../README.md#nowhere", "../tests#nowhere"] {
        assert!(broken(&all[0], link, &all).is_some(), "{link}");
    }
    // A link to a heading of the page itself needs a page that exists.
    let readme = [page("README.md")];
    for link in ["https://example.org/nowhere", "#twice-1", "docs/../README.md#keys-and-code", "engine/src"] {
        assert_eq!(broken(&readme[0], link, &readme), None, "{link}");
    }
}

#[test]
fn the_readme_has_at_most_120_lines() {
    let lines = fs::read_to_string(top().join("README.md")).unwrap().lines().count();
    assert!(lines <= 120, "{lines} lines: move something to docs/");
}

#[test]
fn pages_begin_with_heading_purpose_and_command() {
    let all = documents();
    let pages: Vec<_> = all.iter().filter(|document| document.path.starts_with("docs/")).collect();
    assert!(pages.len() >= 7, "{}", pages.len());
    for Document { path, text } in pages {
        let mut first = text.lines().take(15).filter(|line| !line.is_empty());
        assert!(first.next().unwrap().starts_with("# "), "{path} does not begin with a heading");
        let purpose = first.next().unwrap();
        let is_purpose =
            ["Read this page when ", "Read this page before "].iter().any(|words| purpose.starts_with(words));
        assert!(is_purpose, "{path} does not say when to read it: {purpose}");
        assert!(first.any(|line| line == "```sh"), "{path} has no command in its first 15 lines");
    }
}

/// The README names every page, so that a reader finds it.
#[test]
fn the_readme_links_to_every_page() {
    let all = documents();
    let links = all.iter().find(|document| document.path == "README.md").unwrap().links();
    for page in all.iter().filter(|document| document.path.starts_with("docs/")) {
        assert!(links.contains(&page.path), "README.md does not link to {}", page.path);
    }
}

/// `up` accepts every configuration in a document: `toml` blocks, and files that a command makes.
#[test]
fn configurations_in_documents_are_valid() {
    let mut parsed = 0;
    for Document { path, text } in documents() {
        let blocks = text.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
        let files = text.split("<<'END'\n").skip(1).map(|rest| rest.split("END\n").next().unwrap());
        for configuration in blocks.chain(files) {
            let config = Config::parse(configuration, Path::new("/etc/nbdcrypt/scratch.toml"));
            assert!(config.is_ok(), "{path}: {configuration}\n{}", config.err().unwrap());
            parsed += 1;
        }
    }
    assert!(parsed >= 3, "{parsed}");
}

/// The program accepts every nbdcrypt command in a document, with its options.
#[test]
fn commands_in_documents_can_be_typed() {
    let mut typed = 0;
    for document in documents() {
        for command in document.commands() {
            let command = command.trim_start_matches("sudo ").trim_end_matches('&');
            let words: Vec<_> = command.split_whitespace().take_while(|word| *word != "&&" && *word != "|").collect();
            if words.first() != Some(&"nbdcrypt") || words.contains(&"--version") {
                continue;
            }
            let parsed = Cli::try_parse_from(&words);
            assert!(parsed.is_ok(), "{}: {command}: {}", document.path, parsed.err().unwrap());
            typed += 1;
        }
    }
    assert!(typed > 40, "{typed}");
}
