//! The command line.

use std::path::PathBuf;

use lexopt::prelude::*;
use serde_json::Value;

use super::Result;
use super::table::Row;

#[derive(Default)]
pub struct Args {
    groups: Option<String>,
    pub quick: bool,
    pub sustained: bool,
    pub list: bool,
    torch: Option<PathBuf>,
}

impl Args {
    /// `own` says whether it knows an option, and takes its value.
    pub fn parse(
        groups: &[(char, &str)],
        mut own: impl FnMut(&str, &mut lexopt::Parser) -> Result<bool>,
    ) -> Result<Self> {
        let mut args = Self::default();
        let mut parser = lexopt::Parser::from_env();
        while let Some(arg) = parser.next()? {
            match arg {
                Long("rows") => args.groups = Some(parser.value()?.string()?),
                Long("quick") => args.quick = true,
                Long("sustained") => args.sustained = true,
                Long("torch") => args.torch = Some(parser.value()?.into()),
                Long("list") => args.list = true,
                Long("bench") => {} // cargo's
                Long(option) => {
                    let option = option.to_owned();
                    if !own(&option, &mut parser)? {
                        return Err(format!("no option --{option}").into());
                    }
                }
                _ => return Err(arg.unexpected().into()),
            }
        }
        for letter in args.groups.iter().flat_map(|groups| groups.split(',')) {
            if !groups.iter().any(|(group, _)| letter == group.to_string()) {
                let known = groups.iter().map(|(group, _)| group).collect::<String>();
                return Err(format!("no group {letter:?} of rows: they are {known}").into());
            }
        }
        Ok(args)
    }

    /// The rows of the wanted groups.
    pub fn select<R: Row>(&self, mut rows: Vec<R>) -> Vec<R> {
        let wants = |group| self.groups.as_ref().is_none_or(|groups| groups.contains(group));
        rows.retain(|row| wants(row.group()));
        rows
    }

    /// `{"peer": "torch 2.11", "us": {a row's id: {a peer's name: µs}}}`.
    pub fn torch(&self) -> Result<Option<Value>> {
        let Some(path) = &self.torch else { return Ok(None) };
        let torch: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
        println!("{} from {}: timed by itself, not in turns", torch["peer"], path.display());
        Ok(Some(torch))
    }
}

/// Where results go.
pub fn directory() -> PathBuf {
    std::env::var_os("KAIO_BENCH_DIR").map_or("out/bench".into(), PathBuf::from)
}
