//! `--set NAME=VALUE`: inputs that are the same for every sample.

use crate::error::{Error, Result};
use crate::import::Model;
use crate::tensor::Tensor;

/// Gives inputs of the model values of their own, each as `NAME=VALUE`: before data are bound to the inputs that are left.
///
/// A value is a number (`true` and `false` are 1 and 0), which fills an input of higher rank (see [`crate::graph::Graph::fix`]);
/// several numbers joined by commas, in the order of the elements; or the path of an .npz with an array of the input's name (or
/// with one array only).
pub fn set_inputs(model: &mut Model, given: &[String]) -> Result<()> {
    for text in given {
        let names = model.graph.inputs.iter().map(|v| model.graph.value(*v).name.as_str());
        let split =
            |name: &str| Some((name.to_string(), text.strip_prefix(name)?.strip_prefix('=')?.to_string()));
        let Some((name, value)) = names.filter_map(split).max_by_key(|(name, _)| name.len()) else {
            let names: Vec<&str> =
                model.graph.inputs.iter().map(|v| model.graph.value(*v).name.as_str()).collect();
            return Err(Error::Config(format!(
                "--set {text}: takes NAME=VALUE with an input of the model ({})",
                names.join(", ")
            )));
        };
        let value = parse(&name, &value).map_err(|why| Error::Config(format!("--set {text}: {why}")))?;
        model.fix_input(&name, &value)?;
    }
    Ok(())
}

fn parse(name: &str, text: &str) -> std::result::Result<Tensor, String> {
    if text.ends_with(".npz") {
        return array(name, text);
    }
    let words: Vec<&str> = text.split(',').map(str::trim).collect();
    let whole = |w: &&str| match *w {
        "true" => Some(1),
        "false" => Some(0),
        w => w.parse::<i64>().ok(),
    };
    let dims: &[usize] = if words.len() == 1 { &[] } else { &[words.len()] };
    let made = match words.iter().map(whole).collect::<Option<Vec<i64>>>() {
        Some(ints) => Tensor::from_slice(dims, &ints),
        None => {
            let numbers = words.iter().map(|w| w.parse::<f64>()).collect::<std::result::Result<Vec<_>, _>>();
            Tensor::from_slice(
                dims,
                &numbers.map_err(|_| "not a number, numbers joined by commas, or an .npz")?,
            )
        }
    };
    made.map_err(|e| e.to_string())
}

#[cfg(feature = "cli")]
fn array(name: &str, path: &str) -> std::result::Result<Tensor, String> {
    let mut arrays = crate::train::data::read_npz(path).map_err(|e| e.to_string())?;
    let at = arrays.iter().position(|a| a.0 == name).or((arrays.len() == 1).then_some(0));
    at.map(|i| arrays.swap_remove(i).1).ok_or_else(|| format!("has no array '{name}'"))
}

#[cfg(not(feature = "cli"))]
fn array(_: &str, _: &str) -> std::result::Result<Tensor, String> {
    Err(".npz files are read by the command line only: Model::fix_input takes a tensor".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::make::{import, model, node, value, zeros};
    use crate::tensor::DType;

    /// `x` [batch, 3], `rate` float [2], `by` float scalar.
    fn three() -> Model {
        let nodes = vec![node("Mul", &["x", "by"], &["y"]), node("Identity", &["rate"], &["z"])];
        let mut m = model(nodes, vec![zeros("unused", &[1])], "y");
        let inputs = &mut m.graph.as_mut().unwrap().input;
        inputs.extend([value("rate", &[2]), value("by", &[])]);
        import(&m).unwrap()
    }

    fn set(given: &[&str]) -> Result<Model> {
        let mut m = three();
        set_inputs(&mut m, &given.iter().map(|g| g.to_string()).collect::<Vec<_>>())?;
        Ok(m)
    }

    #[test]
    fn values_are_numbers_or_lists() {
        let m = set(&["by=2", "rate=1.5,-2"]).unwrap();
        assert_eq!(m.graph.inputs.len(), 1);
        let find = |name: &str| {
            let all = m.graph.fixed_values();
            // Shapes of `x` are not known here, nor needed: nothing is filled.
            all.unwrap().into_iter().find(|(v, _)| m.graph.value(*v).name == name).unwrap().1
        };
        assert_eq!((find("by").dims().len(), find("by").get::<f32>().unwrap()), (0, &[2.0][..]));
        assert_eq!(find("rate").get::<f32>().unwrap(), [1.5, -2.0]);
        assert_eq!(find("rate").dtype(), DType::F32);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let why = |g: &str| set(&[g]).unwrap_err().to_string();
        assert!(why("gain=1").contains("x, rate, by"), "{}", why("gain=1"));
        assert!(why("by").contains("NAME=VALUE"));
        assert!(why("by=much").contains("not a number"));
        assert!(why("by=1,2").contains("by") && why("rate=1,2,3").contains("[2]"), "{}", why("rate=1,2,3"));
        assert!(why("rate=none.npz").contains("none.npz"));
    }
}
