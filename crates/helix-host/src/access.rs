// SPDX-License-Identifier: MIT OR Apache-2.0

//! Who may come in: the secret that clients must know.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use helix_protocol::message::AuthToken;
use subtle::ConstantTimeEq;

/// Bytes of a token.
pub const TOKEN_SIZE: usize = AuthToken::MAX_SIZE;

/// Bytes under which the log warns that a token can be guessed: 64 bits, in hexadecimal digits.
const SHORT: usize = 16;

/// What everybody who is neither owner nor of the group may do with a file (inode(7)).
const OTHERS: u32 = 0o007;

/// A secret that clients must send in HELLO. It does not print itself.
pub struct Token(Vec<u8>);

/// Why a file holds no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The system refused.
    #[error("cannot read the token file {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is no secret.
    #[error(
        "the token file {path} is open to every user of this machine (mode {mode:04o}); \
         'chmod 600 {path}' closes it"
    )]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// There is nothing but perhaps a newline in it.
    #[error("the token file {0} is empty; 'openssl rand -hex 32' makes a token")]
    Empty(PathBuf),
    /// No client could send it.
    #[error("the token in {0} has over {TOKEN_SIZE} bytes, the most a token may have")]
    TooLong(PathBuf),
}

impl Token {
    /// Reads a file that holds nothing else. A newline at its end does not count.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let error = |source| TokenError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(error)?;
        let mode = file.metadata().map_err(error)?.permissions().mode() & 0o7777;
        if mode & OTHERS != 0 {
            return Err(TokenError::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        let mut bytes = Vec::new();
        // Room for a newline, and for a byte that shows that it is too long.
        let most = TOKEN_SIZE as u64 + 3;
        file.take(most).read_to_end(&mut bytes).map_err(error)?;
        for end in *b"\n\r" {
            if bytes.last() == Some(&end) {
                bytes.pop();
            }
        }
        match bytes.len() {
            0 => Err(TokenError::Empty(path.to_owned())),
            size @ 1..=TOKEN_SIZE => {
                if size < SHORT {
                    tracing::warn!(
                        file = %path.display(),
                        "the token has fewer than {SHORT} bytes and can be guessed; \
                         'openssl rand -hex 32' makes a better one"
                    );
                }
                Ok(Self(bytes))
            }
            _ => Err(TokenError::TooLong(path.to_owned())),
        }
    }

    /// Whether a client that offers this may come in. The time it takes says nothing of the
    /// token but its length.
    pub fn admits(&self, offered: Option<&AuthToken>) -> bool {
        offered.is_some_and(|AuthToken(offered)| self.0.ct_eq(offered).into())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], mode: u32) -> Result<Token, TokenError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, bytes).unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
        Token::read(file.path())
    }

    fn admits(file: &[u8], offered: &[u8]) -> bool {
        let token = read(file, 0o600).unwrap();
        token.admits(Some(&AuthToken(offered.to_vec())))
    }

    #[test]
    fn one_newline_at_the_end_does_not_count() {
        for file in [&b"secret"[..], b"secret\n", b"secret\r\n"] {
            assert!(admits(file, b"secret"));
        }
        assert!(admits(b"secret\n\n", b"secret\n"));
        assert!(admits(b" a\0b ", b" a\0b "));
    }

    #[test]
    fn nothing_else_is_admitted() {
        for other in [&b""[..], b"secre", b"secrets", b"Secret", b"secret\n"] {
            assert!(!admits(b"secret\n", other));
        }
        assert!(!read(b"secret", 0o600).unwrap().admits(None));
    }

    #[test]
    fn files_that_hold_no_secret_are_refused_with_a_reason() {
        let reason = |bytes: &[u8], mode| read(bytes, mode).unwrap_err().to_string();
        for empty in [&b""[..], b"\n", b"\r\n"] {
            assert!(reason(empty, 0o600).contains("is empty"));
        }
        assert!(reason(&[b'x'; TOKEN_SIZE + 1], 0o600).contains("over 1024 bytes"));
        assert!(reason(&vec![b'x'; 100_000], 0o600).contains("over 1024 bytes"));
        for mode in [0o644, 0o602, 0o666] {
            assert!(reason(b"secret", mode).contains("chmod 600"));
        }
        let missing = Token::read(Path::new("/nonexistent/token")).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/token"));
    }

    #[test]
    fn what_may_just_be_is_accepted() {
        assert!(read(&[b'x'; TOKEN_SIZE], 0o600).is_ok());
        assert!(read(&[&[b'x'; TOKEN_SIZE][..], b"\r\n"].concat(), 0o640).is_ok());
    }

    #[test]
    fn a_token_does_not_print_itself() {
        let token = read(b"secret", 0o600).unwrap();
        assert!(!format!("{token:?}").contains("secret"));
    }
}
