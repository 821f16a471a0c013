//! A page of sections, of which some are measured anew.

/// A page: what stands before its first section, and its sections. A section begins with its
/// heading, `## ...`.
pub(crate) struct Page {
    pub(crate) head: String,
    pub(crate) sections: Vec<String>,
}

impl Page {
    fn read(text: &str) -> Self {
        let mut page = Self { head: String::new(), sections: Vec::new() };
        for line in text.lines() {
            if line.starts_with("## ") {
                page.sections.push(String::new());
            }
            let part = page.sections.last_mut().unwrap_or(&mut page.head);
            *part += line;
            *part += "\n";
        }
        page
    }

    fn text(&self) -> String {
        let parts = [&self.head].into_iter().chain(&self.sections);
        let parts: Vec<&str> = parts.map(|part| part.trim_end()).collect();
        parts.join("\n\n") + "\n"
    }
}

fn heading(section: &str) -> &str {
    section.lines().next().unwrap_or_default()
}

/// The text of a page with the sections of `new`. A section of the page before stays in its place
/// if `new` has none with its heading.
pub(crate) fn updated(before: &str, new: &Page) -> String {
    let mut sections = Page::read(before).sections;
    for section in &new.sections {
        match sections.iter_mut().find(|old| heading(old) == heading(section)) {
            Some(old) => old.clone_from(section),
            None => sections.push(section.clone()),
        }
    }
    Page { head: new.head.clone(), sections }.text()
}
