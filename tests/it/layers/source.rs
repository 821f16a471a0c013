//! What the code of a crate uses. It is read with `syn`, and each path is resolved to its module or
//! outside crate.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{TokenStream, TokenTree};
use syn::{
    Attribute, File, Item, ItemExternCrate, ItemMod, ItemType, ItemUse, Meta, Type, UseTree,
    VisRestricted,
    ext::IdentExt,
    visit::{self, Visit},
};

/// Methods of paths that read the disk.
const LOOKS_AT_DISK: [&str; 9] = [
    "canonicalize",
    "exists",
    "is_dir",
    "is_file",
    "is_symlink",
    "read_dir",
    "read_link",
    "symlink_metadata",
    "try_exists",
];

/// Methods of a time that ask for the current time.
const LOOKS_AT_CLOCK: [&str; 1] = ["elapsed"];

/// A module by its names from the root of the crate.
pub(super) type Module = Vec<String>;

/// The modules that a search has visited, and the paths looked up there.
type Seen = Vec<(Module, Vec<String>)>;

/// A path as it is written, or a macro.
#[derive(Debug, Clone)]
struct Written {
    scope: Module,
    path: Vec<String>,
    is_test: bool,
    is_use: bool,
}

/// A `use`: the name that it binds, `*` for a glob, and the path behind it.
#[derive(Debug, Clone)]
struct Binding {
    name: String,
    path: Vec<String>,
}

/// What a path leads to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    /// Names from the root of the crate.
    Inside(Vec<String>),
    /// Names from an outside crate on; `core` and `alloc` are `std`.
    Outside(Vec<String>),
}

/// A use outside of tests.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Use {
    /// The file, below `src`.
    pub(super) file: String,
    pub(super) target: Target,
}

/// The modules of a crate.
pub(super) struct Crate {
    /// The outside crates that code may name.
    outside: BTreeSet<String>,
    /// The file of each module that has one of its own.
    pub(super) files: BTreeMap<Module, String>,
    modules: BTreeSet<Module>,
    bindings: BTreeMap<Module, Vec<Binding>>,
    /// `type` declarations. They are followed within their own module only.
    aliases: BTreeMap<Module, Vec<Binding>>,
    written: BTreeMap<String, Vec<Written>>,
}

/// The module of a file below `src`.
fn module_of(file: &str) -> Module {
    let path = file.strip_suffix(".rs").unwrap_or(file);
    let path = path.strip_suffix("/mod").unwrap_or(path);
    match path {
        "lib" => Module::new(),
        path => path.split('/').map(str::to_owned).collect(),
    }
}

impl Crate {
    /// Reads sources, each with its path below `src`.
    pub(super) fn read(sources: &[(String, String)], outside: &BTreeSet<String>) -> Self {
        let mut own = Self {
            outside: outside.clone(),
            files: BTreeMap::new(),
            modules: BTreeSet::new(),
            bindings: BTreeMap::new(),
            aliases: BTreeMap::new(),
            written: BTreeMap::new(),
        };
        own.outside.extend(["std", "core", "alloc"].map(str::to_owned));
        let parsed: Vec<(&String, File)> = sources
            .iter()
            .map(|(name, text)| {
                let file = syn::parse_file(text);
                (name, file.unwrap_or_else(|error| panic!("src/{name} is no Rust: {error}")))
            })
            .collect();
        let test_modules: BTreeSet<Module> =
            parsed.iter().flat_map(|(name, file)| test_modules(&module_of(name), file)).collect();
        for (name, file) in &parsed {
            let module = module_of(name);
            let is_test = test_modules.iter().any(|test| module.starts_with(test));
            own.files.insert(module.clone(), (*name).clone());
            own.modules.insert(module.clone());
            let mut reader = Reader { own: &mut own, file: name, scope: module, is_test };
            reader.visit_file(file);
        }
        own
    }

    /// All uses outside of tests.
    pub(super) fn uses(&self) -> BTreeSet<Use> {
        let of_file = |(file, written): (&String, &Vec<Written>)| {
            let own = written.iter().filter(|written| !written.is_test);
            let targets = own.filter_map(|written| self.resolve(written));
            targets.map(|target| Use { file: file.clone(), target }).collect::<Vec<_>>()
        };
        self.written.iter().flat_map(of_file).collect()
    }

    /// The file that holds what a path inside the crate names.
    pub(super) fn file_of(&self, path: &[String]) -> Option<&String> {
        (0..=path.len()).rev().find_map(|n| self.files.get(&path[..n]))
    }

    fn resolve(&self, written: &Written) -> Option<Target> {
        let Written { scope, path, is_use, .. } = written;
        // One name alone is an item of the module or a variable, unless it is imported.
        if path.len() == 1 && !is_use && !path[0].ends_with('!') {
            return None;
        }
        self.look_up(scope, path, &mut Vec::new())
    }

    /// Follows imports to the declaration of a thing. `seen` stops endless loops.
    fn look_up(&self, scope: &[String], path: &[String], seen: &mut Seen) -> Option<Target> {
        let key = (scope.to_vec(), path.to_vec());
        if seen.contains(&key) {
            return None;
        }
        seen.push(key);
        let target = self.look_up_once(scope, path, seen);
        seen.pop();
        target
    }

    fn look_up_once(&self, scope: &[String], path: &[String], seen: &mut Seen) -> Option<Target> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "crate" | "$crate" | "oddscan" => Some(self.inside(&[], rest, seen)),
            "self" if rest.first().is_some_and(|next| next == "super") => {
                self.look_up(scope, rest, seen)
            }
            "self" => Some(self.inside(scope, rest, seen)),
            "super" => {
                let parent = &scope[..scope.len().saturating_sub(1)];
                if rest.first().is_some_and(|next| next == "super") {
                    return self.look_up(parent, rest, seen);
                }
                Some(self.inside(parent, rest, seen))
            }
            "::" => Some(outside(rest)),
            // A printing macro, or one that includes a file.
            name if name.ends_with('!') => Some(Target::Outside(vec![name.to_owned()])),
            name => self
                .aliased(scope, name, rest, seen)
                .or_else(|| self.named(scope, name, rest, seen))
                .or_else(|| self.outside.contains(name).then(|| outside(path))),
        }
    }

    /// The type behind an alias that the module declares.
    fn aliased(
        &self,
        module: &[String],
        name: &str,
        rest: &[String],
        seen: &mut Seen,
    ) -> Option<Target> {
        let mut aliases = self.aliases.get(module)?.iter().filter(|alias| alias.name == name);
        aliases.find_map(|alias| self.look_up(module, &[&alias.path[..], rest].concat(), seen))
    }

    /// The target of a name of a module, with the path that follows it.
    fn named(
        &self,
        module: &[String],
        name: &str,
        rest: &[String],
        seen: &mut Seen,
    ) -> Option<Target> {
        let child = [module, &[name.to_owned()]].concat();
        if self.modules.contains(&child) {
            return Some(self.inside(&child, rest, seen));
        }
        let bindings = self.bindings.get(module).map_or(&[][..], Vec::as_slice);
        for binding in bindings.iter().filter(|binding| binding.name == name) {
            let whole = [&binding.path[..], rest].concat();
            if let Some(target) = self.look_up(module, &whole, seen) {
                return Some(target);
            }
        }
        for glob in bindings.iter().filter(|binding| binding.name == "*") {
            if let Some(Target::Inside(from)) = self.look_up(module, &glob.path, seen)
                && self.modules.contains(&from)
                && let Some(target) = self.named(&from, name, rest, seen)
            {
                return Some(target);
            }
        }
        None
    }

    /// Resolves a path that starts at a module of the crate.
    fn inside(&self, module: &[String], rest: &[String], seen: &mut Seen) -> Target {
        let whole = || Target::Inside([module, rest].concat());
        match rest.split_first() {
            Some((name, more)) if name != "*" && self.modules.contains(module) => {
                self.named(module, name, more, seen).unwrap_or_else(whole)
            }
            _ => whole(),
        }
    }
}

fn outside(path: &[String]) -> Target {
    let mut path = path.to_vec();
    if let Some(first) = path.first_mut()
        && ["core", "alloc"].contains(&first.as_str())
    {
        "std".clone_into(first);
    }
    Target::Outside(path)
}

/// Whether code is compiled for tests only.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) if list.path.is_ident("cfg") => {
            let text = list.tokens.to_string().replace(' ', "");
            text == "test" || text.starts_with("all(test,")
        }
        _ => false,
    })
}

/// Modules in files of their own that are compiled for tests only.
fn test_modules(module: &[String], file: &File) -> Vec<Module> {
    let child = |item: &Item| match item {
        Item::Mod(ItemMod { attrs, ident, content: None, .. }) if is_for_tests(attrs) => {
            Some([module, &[ident.unraw().to_string()]].concat())
        }
        _ => None,
    };
    file.items.iter().filter_map(child).collect()
}

/// Notes what a file uses.
struct Reader<'a> {
    own: &'a mut Crate,
    file: &'a str,
    scope: Module,
    is_test: bool,
}

impl Reader<'_> {
    fn note(&mut self, path: Vec<String>, is_use: bool) {
        let written = Written { scope: self.scope.clone(), path, is_test: self.is_test, is_use };
        self.own.written.entry(self.file.to_owned()).or_default().push(written);
    }

    fn bind(&mut self, name: String, path: Vec<String>) {
        let own = Binding { name, path };
        self.own.bindings.entry(self.scope.clone()).or_default().push(own);
    }

    fn within(&mut self, attributes: &[Attribute], visit: impl FnOnce(&mut Self)) {
        let before = self.is_test;
        self.is_test |= is_for_tests(attributes);
        visit(self);
        self.is_test = before;
    }

    fn use_tree(&mut self, tree: &UseTree, path: &[String]) {
        let with = |name: String| [path, &[name]].concat();
        match tree {
            UseTree::Path(part) => self.use_tree(&part.tree, &with(part.ident.unraw().to_string())),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.use_tree(tree, path)),
            UseTree::Glob(_) => {
                self.note(with("*".to_owned()), true);
                self.bind("*".to_owned(), path.to_vec());
            }
            UseTree::Name(name) => {
                let whole = self.whole(path, name.ident.unraw().to_string());
                self.note(whole.clone(), true);
                self.bind(whole.last().cloned().unwrap_or_default(), whole);
            }
            UseTree::Rename(rename) => {
                let whole = self.whole(path, rename.ident.unraw().to_string());
                self.note(whole.clone(), true);
                self.bind(rename.rename.unraw().to_string(), whole);
            }
        }
    }

    /// A path, maybe of a type in `<>`. Such a path starts with `::` but no crate follows.
    fn qualified(&mut self, of: Option<&syn::QSelf>, path: &syn::Path) {
        match of {
            Some(of) if of.position == 0 => {
                self.visit_type(&of.ty);
                if let Type::Path(own) = &*of.ty {
                    let after = path.segments.iter().map(|part| part.ident.unraw().to_string());
                    self.note(names(&own.path).into_iter().chain(after).collect(), false);
                }
                path.segments.iter().for_each(|part| self.visit_path_arguments(&part.arguments));
            }
            Some(of) => {
                self.visit_type(&of.ty);
                self.visit_path(path);
            }
            None => self.visit_path(path),
        }
    }

    /// `self` at the end of a group is what stands before the group.
    fn whole(&self, path: &[String], name: String) -> Vec<String> {
        if name == "self" && !path.is_empty() { path.to_vec() } else { [path, &[name]].concat() }
    }

    /// Paths, imports and macros in tokens that are not parsed.
    fn tokens(&mut self, tokens: TokenStream) {
        self.tokens_after(&[], tokens);
    }

    /// Like [`Reader::tokens`], after a path that ends in a group.
    fn tokens_after(&mut self, prefix: &[String], tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let is_colons = |at: usize| is_punct(&tokens, at, ':') && is_punct(&tokens, at + 1, ':');
        let mut at = 0;
        while at < tokens.len() {
            let mut path = prefix.to_vec();
            // `::name`, unless it continues something that is no path, like `<T>::name`.
            let is_arrow =
                at > 1 && (is_punct(&tokens, at - 2, '-') || is_punct(&tokens, at - 2, '='));
            let goes_on = at > 0 && is_punct(&tokens, at - 1, '>') && !is_arrow;
            if is_colons(at) && matches!(tokens.get(at + 2), Some(TokenTree::Ident(_))) {
                at += 2;
                path.push(if goes_on { "<>" } else { "::" }.to_owned());
            }
            match &tokens[at] {
                TokenTree::Ident(ident) => {
                    path.push(ident.unraw().to_string());
                    at += 1;
                    while is_colons(at) {
                        match tokens.get(at + 2) {
                            Some(TokenTree::Ident(ident)) => path.push(ident.unraw().to_string()),
                            Some(TokenTree::Punct(star)) if star.as_char() == '*' => {
                                path.push("*".to_owned());
                            }
                            Some(TokenTree::Group(group)) => {
                                self.tokens_after(&path, group.stream());
                            }
                            _ => break,
                        }
                        at += 3;
                    }
                    if is_punct(&tokens, at, '!')
                        && matches!(tokens.get(at + 1), Some(TokenTree::Group(_)))
                    {
                        self.macro_named(&path);
                    }
                    let is_use = !prefix.is_empty();
                    self.note(path, is_use);
                }
                TokenTree::Group(group) => {
                    self.tokens_after(&[], group.stream());
                    at += 1;
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => at += 1,
            }
        }
    }

    /// Macros of the standard library are known by their last name.
    fn macro_named(&mut self, path: &[String]) {
        const KNOWN: [&str; 6] = ["print", "println", "eprint", "eprintln", "dbg", "include"];
        if let Some(name) = path.last().filter(|name| KNOWN.contains(&name.as_str())) {
            self.note(vec![format!("{name}!")], true);
        }
    }
}

fn is_punct(tokens: &[TokenTree], at: usize, char: char) -> bool {
    matches!(tokens.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == char)
}

fn names(path: &syn::Path) -> Vec<String> {
    let root = path.leading_colon.as_ref().map(|_| "::".to_owned());
    root.into_iter()
        .chain(path.segments.iter().map(|part| part.ident.unraw().to_string()))
        .collect()
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        self.within(attributes_of(item), |reader| visit::visit_item(reader, item));
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.within(&item.attrs, |reader| visit::visit_impl_item_fn(reader, item));
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        assert!(
            self.is_test || !item.attrs.iter().any(|attribute| attribute.path().is_ident("path")),
            "src/{}: the guard does not follow #[path]",
            self.file
        );
        self.scope.push(item.ident.unraw().to_string());
        self.own.modules.insert(self.scope.clone());
        visit::visit_item_mod(self, item);
        self.scope.pop();
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let root: Vec<String> =
            item.leading_colon.as_ref().map(|_| "::".to_owned()).into_iter().collect();
        self.use_tree(&item.tree, &root);
    }

    fn visit_item_extern_crate(&mut self, item: &'ast ItemExternCrate) {
        let path = vec!["::".to_owned(), item.ident.unraw().to_string()];
        self.note(path.clone(), true);
        let name = item.rename.as_ref().map_or(&item.ident, |(_, name)| name);
        self.bind(name.unraw().to_string(), path);
    }

    fn visit_expr_path(&mut self, path: &'ast syn::ExprPath) {
        self.qualified(path.qself.as_ref(), &path.path);
    }

    fn visit_type_path(&mut self, path: &'ast syn::TypePath) {
        self.qualified(path.qself.as_ref(), &path.path);
    }

    fn visit_item_type(&mut self, item: &'ast ItemType) {
        if let Type::Path(path) = &*item.ty {
            let own = Binding { name: item.ident.unraw().to_string(), path: names(&path.path) };
            self.own.aliases.entry(self.scope.clone()).or_default().push(own);
        }
        visit::visit_item_type(self, item);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.note(names(path), false);
        visit::visit_path(self, path);
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        if LOOKS_AT_DISK.iter().any(|name| call.method == name) {
            self.note(["::", "std", "fs"].map(str::to_owned).to_vec(), true);
        }
        if LOOKS_AT_CLOCK.iter().any(|name| call.method == name) {
            self.note(["::", "std", "time"].map(str::to_owned).to_vec(), true);
        }
        visit::visit_expr_method_call(self, call);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        let path = names(&call.path);
        self.macro_named(&path);
        self.note(path, false);
        self.tokens(call.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        self.note(names(attribute.path()), false);
        if let Meta::List(list) = &attribute.meta {
            self.tokens(list.tokens.clone());
        }
    }

    /// States who may use a thing; uses nothing itself.
    fn visit_vis_restricted(&mut self, _: &'ast VisRestricted) {}
}

fn attributes_of(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::ForeignMod(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::TraitAlias(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Inside(path) => write!(f, "crate::{}", path.join("::")),
            Self::Outside(path) => f.write_str(&path.join("::")),
        }
    }
}
