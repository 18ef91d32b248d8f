//! The syntax of option values: `key=value,key=value`.
//!
//! ```text
//! options = [ pair *( "," pair ) ]
//! pair    = key "=" value
//! value   = *( byte | quoted ) | "[" [ value *( "," value ) ] "]"
//! quoted  = DQUOTE *( byte | DQUOTE DQUOTE ) DQUOTE
//! ```
//!
//! A comma separates unless it stands in quotes or brackets. In quotes, two quotes mean one.
//! Sizes are bytes with an optional binary `K`, `M`, `G` or `T`; toggles are `on`, `off`, `true`
//! or `false`. What always holds: no key is passed over. A key that is unknown or given twice is
//! an error that names it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::str::FromStr;

/// Bytes of an option value; the kernel's limit for one argument (`MAX_ARG_STRLEN`).
const TEXT_BYTES_MAX: usize = 128 << 10;

/// What is wrong with an option value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    #[error("Value is longer than {TEXT_BYTES_MAX} bytes")]
    TooLong,
    #[error("Quotes are not closed in {0:?}")]
    OpenQuote(String),
    #[error("Brackets do not match in {0:?}")]
    Brackets(String),
    #[error("Expected key=value, found {0:?}")]
    NoValue(String),
    #[error("Key {key:?} is unknown, known are: {known}")]
    UnknownKey { key: String, known: String },
    #[error("Key {0:?} is given more than once")]
    DuplicateKey(String),
    #[error("Key {0:?} is required")]
    MissingKey(&'static str),
    #[error("Key {key:?} takes {wanted}, not {value:?}")]
    BadValue { key: String, wanted: String, value: String },
    #[error("Value is one of {wanted}, not {value:?}")]
    BadWord { wanted: &'static str, value: String },
}

/// The pairs of an option value, each taken at most once.
#[derive(Clone, Debug, Default)]
pub struct Pairs {
    raw: BTreeMap<String, String>,
}

impl Pairs {
    /// Parses `text`, in which no key but those in `known` may appear.
    ///
    /// # Errors
    ///
    /// The syntax is broken, or a key unknown or repeated.
    pub fn parse(text: &str, known: &[&str]) -> Result<Self, OptionError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(OptionError::TooLong);
        }
        let mut raw = BTreeMap::new();
        if text.is_empty() {
            return Ok(Self { raw });
        }
        for piece in split(text)? {
            let Some((key, value)) = piece.split_once('=') else {
                return Err(OptionError::NoValue(piece.to_owned()));
            };
            if !known.contains(&key) {
                return Err(OptionError::UnknownKey {
                    key: key.to_owned(),
                    known: known.join(", "),
                });
            }
            if raw.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(OptionError::DuplicateKey(key.to_owned()));
            }
        }
        Ok(Self { raw })
    }

    /// The text of `key`, without its quotes.
    pub fn text(&mut self, key: &str) -> Option<String> {
        self.raw.remove(key).map(|raw| unquote(&raw))
    }

    /// The text of a key that must be there.
    ///
    /// # Errors
    ///
    /// The key is missing.
    pub fn required(&mut self, key: &'static str) -> Result<String, OptionError> {
        self.text(key).ok_or(OptionError::MissingKey(key))
    }

    /// A path. An empty one is an error: it would mean another file than the one that was meant.
    ///
    /// # Errors
    ///
    /// The value is empty.
    pub fn path(&mut self, key: &str) -> Result<Option<PathBuf>, OptionError> {
        self.with(key, "a path", |text| (!text.is_empty()).then(|| PathBuf::from(text)))
    }

    /// A number or address: whatever the standard library reads.
    ///
    /// # Errors
    ///
    /// The value is not `wanted`.
    pub fn parsed<T: FromStr>(
        &mut self,
        key: &str,
        wanted: &str,
    ) -> Result<Option<T>, OptionError> {
        // The standard library would take a sign where no negative number is meant.
        self.with(key, wanted, |text| text.parse().ok().filter(|_| !text.starts_with('+')))
    }

    /// A number of bytes.
    ///
    /// # Errors
    ///
    /// The value is no size, or more than 2^64 − 1 bytes.
    pub fn size(&mut self, key: &str) -> Result<Option<u64>, OptionError> {
        self.with(key, "a size as 4096, 512M or 4G", parse_size)
    }

    /// A toggle.
    ///
    /// # Errors
    ///
    /// The value is no toggle.
    pub fn toggle(&mut self, key: &str) -> Result<Option<bool>, OptionError> {
        self.with(key, "on or off", |text| match text {
            "on" | "true" => Some(true),
            "off" | "false" => Some(false),
            _ => None,
        })
    }

    /// One of several words.
    ///
    /// # Errors
    ///
    /// The value is none of them.
    pub fn word<T: Copy>(
        &mut self,
        key: &str,
        words: &[(&str, T)],
    ) -> Result<Option<T>, OptionError> {
        let wanted = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join("|");
        self.with(key, &wanted, |text| {
            words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value)
        })
    }

    /// The items of a list, without their quotes.
    ///
    /// # Errors
    ///
    /// The value is no list.
    pub fn list(&mut self, key: &str) -> Result<Option<Vec<String>>, OptionError> {
        let Some(items) = self.raw_list(key)? else { return Ok(None) };
        Ok(Some(items.iter().map(|item| unquote(item)).collect()))
    }

    /// The items of a list as they are written, for lists within lists.
    ///
    /// # Errors
    ///
    /// The value is no list.
    pub fn raw_list(&mut self, key: &str) -> Result<Option<Vec<String>>, OptionError> {
        let Some(raw) = self.raw.remove(key) else { return Ok(None) };
        items(&raw).map(Some).ok_or_else(|| bad(key, "a list as [a,b]", &raw))
    }

    /// Whatever `read` makes of the text.
    ///
    /// # Errors
    ///
    /// `read` makes nothing of it.
    pub fn with<T>(
        &mut self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, OptionError> {
        let Some(text) = self.text(key) else { return Ok(None) };
        read(&text).map(Some).ok_or_else(|| bad(key, wanted, &text))
    }
}

/// A value that is not what its key takes.
pub(crate) fn bad(key: &str, wanted: &str, value: &str) -> OptionError {
    OptionError::BadValue {
        key: key.to_owned(),
        wanted: wanted.to_owned(),
        value: value.to_owned(),
    }
}

/// The items of `[a,b]` as they are written, or nothing where `raw` is no list.
pub(crate) fn items(raw: &str) -> Option<Vec<String>> {
    let inner = raw.strip_prefix('[')?.strip_suffix(']')?;
    if inner.is_empty() {
        return Some(Vec::new());
    }
    Some(split(inner).ok()?.into_iter().map(str::to_owned).collect())
}

/// A number of bytes with an optional binary unit.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        b'T' | b't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    // Digits only: the standard library would take a sign as well.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Writes pairs so that [`Pairs::parse`] reads the same again.
#[derive(Clone, Debug, Default)]
pub struct PairWriter {
    text: String,
}

impl PairWriter {
    /// Adds a pair, its value in quotes where it needs them.
    #[must_use]
    pub fn pair(mut self, key: &str, value: &str) -> Self {
        if !self.text.is_empty() {
            self.text.push(',');
        }
        write!(self.text, "{key}={}", quote(value)).expect("writing to a string cannot fail");
        self
    }

    /// Adds a pair if there is a value.
    #[must_use]
    pub fn optional(self, key: &str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.pair(key, value),
            None => self,
        }
    }

    /// Adds a list if it has items.
    #[must_use]
    pub fn list(mut self, key: &str, items: impl Iterator<Item = String>) -> Self {
        let items: Vec<_> = items.map(|item| quote(&item)).collect();
        if !items.is_empty() {
            let comma = if self.text.is_empty() { "" } else { "," };
            write!(self.text, "{comma}{key}=[{}]", items.join(","))
                .expect("writing to a string cannot fail");
        }
        self
    }

    /// The whole text.
    #[must_use]
    pub fn finish(self) -> String {
        self.text
    }
}

/// `value` in quotes, where it would be read otherwise than it is meant.
fn quote(value: &str) -> String {
    if value.contains([',', '"', '[', ']']) {
        format!("\"{}\"", value.replace('"', "\"\""))
    } else {
        value.to_owned()
    }
}

/// `raw` without its quotes; two quotes within quotes become one.
pub(crate) fn unquote(raw: &str) -> String {
    let mut text = String::with_capacity(raw.len());
    let mut quoted = false;
    let mut chars = raw.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                text.push('"');
            }
            '"' => quoted = !quoted,
            other => text.push(other),
        }
    }
    text
}

/// Splits at the commas that stand neither in quotes nor in brackets.
pub(crate) fn split(text: &str) -> Result<Vec<&str>, OptionError> {
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut depth = 0_usize;
    let mut quoted = false;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            // Two quotes within quotes close and open again, which comes to the same here.
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'[' => depth += 1,
            b']' => {
                let error = || OptionError::Brackets(text.to_owned());
                depth = depth.checked_sub(1).ok_or_else(error)?;
            }
            b',' if depth == 0 => {
                pieces.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if quoted {
        return Err(OptionError::OpenQuote(text.to_owned()));
    }
    if depth != 0 {
        return Err(OptionError::Brackets(text.to_owned()));
    }
    pieces.push(&text[start..]);
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEYS: [&str; 4] = ["a", "b", "c", "long_key"];

    fn parse(text: &str) -> Result<Pairs, OptionError> {
        Pairs::parse(text, &KEYS)
    }

    #[test]
    fn commas_in_quotes_and_brackets_do_not_separate() {
        let mut pairs = parse("a=\"x,y\",b=[1,2,[3,4]],c=tcp:[::1]:4000,long_key=k=v").unwrap();
        assert_eq!(pairs.text("a").unwrap(), "x,y");
        assert_eq!(pairs.raw_list("b").unwrap().unwrap(), ["1", "2", "[3,4]"]);
        assert_eq!(pairs.text("c").unwrap(), "tcp:[::1]:4000");
        assert_eq!(pairs.text("long_key").unwrap(), "k=v");
        assert_eq!(pairs.text("a"), None);
    }

    #[test]
    fn quotes_are_taken_off_and_doubled_ones_kept() {
        for (raw, value) in [
            ("\"\"", ""),
            ("\"x\"", "x"),
            ("x\"y\"z", "xyz"),
            ("\"x\"\"y\"", "x\"y"),
            ("\"[\"", "["),
        ] {
            assert_eq!(parse(&format!("a={raw}")).unwrap().text("a").unwrap(), value, "{raw}");
        }
        let mut pairs = parse("a=[\"x,y\",z,\"]\"]").unwrap();
        assert_eq!(pairs.list("a").unwrap().unwrap(), ["x,y", "z", "]"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &str| parse(text).unwrap_err();
        assert_eq!(
            error("a=1,d=2"),
            OptionError::UnknownKey { key: "d".to_owned(), known: KEYS.join(", ") }
        );
        assert!(error("a=1,d=2").to_string().contains("\"d\" is unknown"));
        assert_eq!(error("a=1,a=1"), OptionError::DuplicateKey("a".to_owned()));
        for broken in ["a", "a=1,", ",a=1", "a=1,,b=2", "a=1,b"] {
            assert!(matches!(error(broken), OptionError::NoValue(_)), "{broken}");
        }
        assert!(matches!(error("a=\"x"), OptionError::OpenQuote(_)));
        for broken in ["a=[1", "a=1]", "a=][", "a=[[1]"] {
            assert!(matches!(error(broken), OptionError::Brackets(_)), "{broken}");
        }
        assert_eq!(error(&format!("a={}", "x".repeat(TEXT_BYTES_MAX))), OptionError::TooLong);
        assert!(parse("").is_ok());
        assert_eq!(parse("").unwrap().required("a"), Err(OptionError::MissingKey("a")));
    }

    #[test]
    fn sizes_have_binary_units() {
        for (text, size) in [
            ("0", Some(0)),
            ("4096", Some(4096)),
            ("1K", Some(1 << 10)),
            ("512M", Some(512 << 20)),
            ("3g", Some(3 << 30)),
            ("2T", Some(2 << 40)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("16777216T", None),
            ("16777215T", Some(16_777_215 << 40)),
            ("", None),
            ("M", None),
            ("-1", None),
            ("+1", None),
            ("1.5G", None),
            ("1MB", None),
            ("1 M", None),
            ("0x10", None),
            ("1é", None),
        ] {
            assert_eq!(parse_size(text), size, "{text}");
        }
    }

    #[test]
    fn toggles_are_four_words() {
        for (text, value) in [("on", true), ("true", true), ("off", false), ("false", false)] {
            assert_eq!(parse(&format!("a={text}")).unwrap().toggle("a"), Ok(Some(value)));
        }
        for text in ["", "ON", "yes", "1"] {
            let error = parse(&format!("a={text}")).unwrap().toggle("a").unwrap_err();
            assert_eq!(error.to_string(), format!("Key \"a\" takes on or off, not {text:?}"));
        }
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parser(text in "[ab=,\\[\\]\"KMx0-9é]{0,60}") {
            if let Ok(mut pairs) = parse(&text) {
                for key in KEYS {
                    let mut again = pairs.clone();
                    let _ = again.list(key);
                    let mut again = pairs.clone();
                    let _ = again.size(key);
                    let _ = pairs.text(key);
                }
            }
        }

        #[test]
        fn what_is_written_is_read(values in proptest::collection::vec(".{0,20}", 4)) {
            let writer = KEYS
                .iter()
                .zip(&values)
                .fold(PairWriter::default(), |writer, (key, value)| writer.pair(key, value));
            let mut pairs = parse(&writer.finish()).unwrap();
            for (key, value) in KEYS.iter().zip(&values) {
                prop_assert_eq!(&pairs.text(key).unwrap(), value);
            }
        }
    }
}
