//! Where things are fetched from and kept, and how patient we are.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use crate::HubError;

/// A secret for the hub: shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(pub(crate) String);

impl Token {
    /// Takes a token; surrounding white space is not part of it.
    ///
    /// # Errors
    /// [`HubError::Setting`] unless it is visible ASCII characters.
    pub fn new(text: &str) -> Result<Self, HubError> {
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
            let reason = "a token is visible ASCII characters".into();
            return Err(HubError::Setting { name: "HF_TOKEN", reason });
        }
        Ok(Token(text.into()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Settings of a pull. [`Options::from_env`] reads those that Hugging Face tools share.
#[derive(Debug, Clone)]
pub struct Options {
    /// The hub, without a final slash.
    pub endpoint: String,
    /// Sent to the endpoint's host and port only.
    pub token: Option<Token>,
    /// Holds `models--org--name`.
    pub hub_cache: PathBuf,
    /// Holds one folder per URL, for directories that are not on a hub.
    pub directory_cache: PathBuf,
    /// PEM certificates to trust instead of the built-in ones.
    pub ca_file: Option<PathBuf>,
    /// Use the cache only.
    pub offline: bool,
    /// Ask the server what the revision is today, even if the cache holds one.
    pub refresh: bool,
    /// Files fetched at once.
    pub parallel: usize,
    /// Requests for one thing that may fail in a row before the pull gives up.
    pub tries: u32,
    /// The first wait after a failure; doubled up to [`Options::MAX_BACKOFF`] unless the server names a time.
    pub backoff: Duration,
    /// How long a connection may stay silent.
    pub stall: Duration,
    /// Free bytes for this user in the file system of a folder.
    pub free_space: fn(&Path) -> io::Result<u64>,
    /// Waits between tries.
    pub sleep: fn(Duration),
}

impl Options {
    /// The longest wait that we choose.
    pub const MAX_BACKOFF: Duration = Duration::from_secs(30);
    /// The longest wait that a server may ask for.
    pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

    /// Defaults, with everything cached under `home` (which Hugging Face tools call `HF_HOME`).
    pub fn new(home: &Path) -> Self {
        Options {
            endpoint: "https://huggingface.co".into(),
            token: None,
            hub_cache: home.join("hub"),
            directory_cache: home.join("baton"),
            ca_file: None,
            offline: false,
            refresh: false,
            parallel: 4,
            tries: 6,
            backoff: Duration::from_secs(1),
            stall: Duration::from_secs(30),
            free_space,
            sleep: thread::sleep,
        }
    }

    /// Defaults under `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE` and
    /// `SSL_CERT_FILE`, as Hugging Face tools read them. `env` looks a variable up: `|name| std::env::var(name).ok()`.
    ///
    /// # Errors
    /// [`HubError::Setting`] or [`HubError::Io`] for a value that cannot be used.
    pub fn from_env(env: impl Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let env = |name: &str| env(name).filter(|value| !value.is_empty());
        let cache =
            || env("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(PathBuf::from(env("HOME")?).join(".cache")));
        let home = env("HF_HOME").map(PathBuf::from).or_else(|| Some(cache()?.join("huggingface")));
        let Some(home) = home else {
            let reason = "neither it nor HOME is set, so there is no place for the cache".into();
            return Err(HubError::Setting { name: "HF_HOME", reason });
        };
        let mut options = Options::new(&home);
        if let Some(folder) = env("HF_HUB_CACHE").or_else(|| env("HUGGINGFACE_HUB_CACHE")) {
            options.hub_cache = folder.into();
        }
        if let Some(endpoint) = env("HF_ENDPOINT") {
            options.endpoint = endpoint.trim_end_matches('/').into();
        }
        let token_file = env("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        options.token = match env("HF_TOKEN") {
            Some(token) => Some(Token::new(&token)?),
            None => match fs::read_to_string(&token_file) {
                Ok(text) if !text.trim().is_empty() => Some(Token::new(&text)?),
                Ok(_) => None,
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => None,
                Err(cause) => return Err(HubError::Io { path: token_file, cause }),
            },
        };
        options.offline = match env("HF_HUB_OFFLINE").map(|v| v.to_ascii_lowercase()).as_deref() {
            Some("1" | "on" | "yes" | "true") => true,
            None | Some("0" | "off" | "no" | "false") => false,
            Some(_) => {
                let reason = "accepted are 1, on, yes, true, 0, off, no, false".into();
                return Err(HubError::Setting { name: "HF_HUB_OFFLINE", reason });
            }
        };
        options.ca_file = env("SSL_CERT_FILE").map(PathBuf::from);
        Ok(options)
    }
}

/// What an unprivileged user may still write.
fn free_space(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(pairs: &[(&str, &str)]) -> Result<Options, HubError> {
        Options::from_env(|name| pairs.iter().find(|p| p.0 == name).map(|p| p.1.to_owned()))
    }

    #[test]
    fn folders_follow_the_rules_of_hugging_face_tools() {
        let hub = |pairs: &[(&str, &str)]| from(pairs).unwrap().hub_cache;
        assert_eq!(hub(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(hub(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]), Path::new("/c/huggingface/hub"));
        assert_eq!(hub(&[("HOME", "/h"), ("HF_HOME", "/f")]), Path::new("/f/hub"));
        assert_eq!(hub(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/g")]), Path::new("/g"));
        assert!(matches!(from(&[]), Err(HubError::Setting { name: "HF_HOME", .. })));
    }

    #[test]
    fn the_token_comes_from_the_environment_or_the_file_and_is_never_shown() {
        let home = tempfile::tempdir().unwrap();
        let home_env = ("HF_HOME", home.path().to_str().unwrap());
        assert_eq!(from(&[home_env]).unwrap().token, None);
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(from(&[home_env]).unwrap().token, Some(Token("hf_file".into())));
        let options = from(&[home_env, ("HF_TOKEN", " hf_env ")]).unwrap();
        assert_eq!(options.token, Some(Token("hf_env".into())));
        assert!(!format!("{options:?}").contains("hf_env"));
        assert!(matches!(from(&[home_env, ("HF_TOKEN", "a\r\nb")]), Err(HubError::Setting { name: "HF_TOKEN", .. })));
    }

    #[test]
    fn offline_is_read_as_hugging_face_tools_do_and_nonsense_is_refused() {
        let offline = |value| from(&[("HF_HOME", "/f"), ("HF_HUB_OFFLINE", value)]).map(|o| o.offline);
        assert!(offline("1").unwrap() && offline("True").unwrap());
        assert!(!offline("0").unwrap() && !offline("").unwrap());
        assert!(matches!(offline("perhaps"), Err(HubError::Setting { .. })));
    }

    #[test]
    fn free_space_of_a_real_folder_is_known() {
        assert!(free_space(tempfile::tempdir().unwrap().path()).unwrap() > 0);
        assert!(free_space(Path::new("/no/such/folder")).is_err());
    }
}
