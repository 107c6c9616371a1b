//! Reads Rust source for tests of the architecture: which modules of its own crate a file names.
//!
//! The source is read as tokens, so comments and strings do not count, and paths inside macros do. A path counts if it
//! starts with `crate::` or `super::`. It may be in an expression, or in a `use` list of any depth and number of lines.
//! Code under `#[cfg(test)]` does not count.

use std::fs;
use std::path::Path;
use std::str::FromStr;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A Rust source file.
pub struct Source {
    /// The path from the repository's top, such as `engine/src/xts/mod.rs`.
    pub path: String,
    /// The whole text.
    pub text: String,
}

/// The segments of a path, resolved to start at the crate's root, such as `xts` and `cpu`. `self` and `*` are left out.
pub type Named = Vec<String>;

/// Returns the repository's top folder.
pub fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is a folder of the repository")
}

/// Returns all source files of these crates.
///
/// # Panics
/// If a folder or file cannot be read.
pub fn sources(crates: &[&str]) -> Vec<Source> {
    let mut folders: Vec<_> = crates.iter().map(|name| top().join(name).join("src")).collect();
    let mut all = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                all.push(Source { path: path.strip_prefix(top()).unwrap().to_str().unwrap().to_owned(), text });
            }
        }
    }
    assert!(all.len() > 5, "too few source files of {crates:?} were found");
    all
}

impl Source {
    /// Returns the name of the crate's folder, such as `engine`.
    pub fn crate_name(&self) -> &str {
        self.path.split('/').next().unwrap()
    }

    /// Returns the module's path in its crate: `xts` and `cpu` for `engine/src/xts/cpu.rs`, nothing for `lib.rs`.
    pub fn module(&self) -> Vec<String> {
        let inside = self.path.split_once("/src/").map_or("", |(_, inside)| inside);
        let mut segments: Vec<String> = inside.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
        if segments.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
            segments.pop();
        }
        segments
    }

    /// Returns whether the file holds only tests.
    fn is_test(&self) -> bool {
        self.path.ends_with("/tests.rs") || self.path.contains("/tests/")
    }

    /// Returns the lines of code, with their numbers. Leaves out lines of comments and the tests, which begin at the
    /// first `#[cfg(test)]` at the start of a line.
    pub fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let code = if self.is_test() { "" } else { self.text.split("\n#[cfg(test)]\n").next().unwrap() };
        code.lines()
            .enumerate()
            .map(|(index, line)| (index + 1, line))
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    /// Returns the paths into its own crate that the file names.
    ///
    /// # Panics
    /// If the file is not Rust.
    pub fn names(&self) -> Vec<Named> {
        let mut named = Vec::new();
        if !self.is_test() {
            let tokens = TokenStream::from_str(&self.text).unwrap_or_else(|error| panic!("{}: {error}", self.path));
            collect(&tokens.into_iter().collect::<Vec<_>>(), &self.module(), &mut named);
        }
        named
    }
}

fn is_punct(token: Option<&TokenTree>, wanted: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == wanted)
}

fn is_path_separator(tokens: &[TokenTree]) -> bool {
    is_punct(tokens.first(), ':') && is_punct(tokens.get(1), ':')
}

fn group_of(token: &TokenTree, delimiter: Delimiter) -> Option<Vec<TokenTree>> {
    match token {
        TokenTree::Group(group) if group.delimiter() == delimiter => Some(group.stream().into_iter().collect()),
        _ => None,
    }
}

/// Returns the number of tokens of an item under `#[cfg(test)]` at the start of `tokens`, or 0.
fn test_item_len(tokens: &[TokenTree]) -> usize {
    let is_cfg_test = is_punct(tokens.first(), '#')
        && tokens.get(1).is_some_and(|token| token.to_string().replace(' ', "") == "[cfg(test)]");
    if !is_cfg_test {
        return 0;
    }
    let ends = |token: &TokenTree| is_punct(Some(token), ';') || group_of(token, Delimiter::Brace).is_some();
    tokens.iter().position(ends).map_or(tokens.len(), |end| end + 1)
}

fn collect(tokens: &[TokenTree], module: &[String], named: &mut Vec<Named>) {
    let mut at = 0;
    while let Some(token) = tokens.get(at) {
        let test = test_item_len(&tokens[at..]);
        if test > 0 {
            at += test;
            continue;
        }
        match token {
            TokenTree::Group(group) => {
                collect(&group.stream().into_iter().collect::<Vec<_>>(), module, named);
            }
            // A path such as `a::super::b` does not exist: what stands before the keyword cannot be part of the path.
            TokenTree::Ident(ident) if ident == "crate" || ident == "super" => {
                let is_crate = ident == "crate";
                let mut base = if is_crate { Vec::new() } else { parent(module) };
                let mut rest = &tokens[at + 1..];
                while !is_crate
                    && is_path_separator(rest)
                    && matches!(rest.get(2), Some(TokenTree::Ident(next)) if next == "super")
                {
                    base.pop();
                    rest = &rest[3..];
                    at += 3;
                }
                if is_path_separator(rest) {
                    tree(&rest[2..], &base, named);
                }
            }
            _ => {}
        }
        at += 1;
    }
}

fn parent(module: &[String]) -> Vec<String> {
    module[..module.len().saturating_sub(1)].to_vec()
}

/// Reads a path, or a list of paths in braces, and adds what it names below `base`.
fn tree(tokens: &[TokenTree], base: &[String], named: &mut Vec<Named>) {
    let Some(first) = tokens.first() else { return };
    if let Some(list) = group_of(first, Delimiter::Brace) {
        for item in list.split(|token| is_punct(Some(token), ',')) {
            tree(item, base, named);
        }
        return;
    }
    let mut segments = base.to_vec();
    match first {
        TokenTree::Ident(ident) if ident != "self" => segments.push(ident.to_string()),
        _ => {}
    }
    if is_path_separator(&tokens[1..]) {
        tree(&tokens[3..], &segments, named);
    } else {
        named.push(segments);
    }
}
