//! Reads DINOv2 from ONNX files of the PyTorch exporter. Biases and norms have Hugging Face's
//! names. The weights of products are transposed and have no name; their nodes identify them.
//!
//! Only the necessary fields are declared (onnx.proto3 of ONNX 1.16). All others are skipped.

use std::collections::HashMap;

use prost::Message;

use super::tensor::{Tensor, Tensors};

#[derive(Clone, PartialEq, Message)]
pub(super) struct Model {
    #[prost(message, optional, tag = "7")]
    pub(super) graph: Option<Graph>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Graph {
    #[prost(message, repeated, tag = "1")]
    pub(super) node: Vec<Node>,
    #[prost(message, repeated, tag = "5")]
    pub(super) initializer: Vec<Initializer>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Node {
    #[prost(string, repeated, tag = "1")]
    pub(super) input: Vec<String>,
    #[prost(string, tag = "3")]
    pub(super) name: String,
    #[prost(string, tag = "4")]
    pub(super) op_type: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Initializer {
    #[prost(int64, repeated, tag = "1")]
    pub(super) dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    pub(super) data_type: i32,
    #[prost(float, repeated, tag = "4")]
    pub(super) float_data: Vec<f32>,
    #[prost(string, tag = "8")]
    pub(super) name: String,
    #[prost(bytes = "vec", tag = "9")]
    pub(super) raw_data: Vec<u8>,
}

/// As [`Model`], but it only counts nodes and tensors and stores none.
#[derive(Clone, PartialEq, Message)]
struct Counted {
    #[prost(message, optional, tag = "7")]
    graph: Option<CountedGraph>,
}

#[derive(Clone, PartialEq, Message)]
struct CountedGraph {
    #[prost(message, repeated, tag = "1")]
    node: Vec<()>,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<()>,
}

/// Limit on nodes and tensors. An export of ViT-L has thousands. An empty one takes two bytes in
/// the file and 100 in memory.
const MAX_PARTS: usize = 100_000;

/// `TensorProto.DataType.FLOAT`.
pub(super) const FLOAT: i32 = 1;

/// Prefixes that exporters put before Hugging Face's names.
const PREFIXES: [&str; 3] = ["backbone.", "model.", "dinov2."];

/// The backbone's tensors under Hugging Face's names. Tensors of heads and decoders are left out.
pub(super) fn tensors(bytes: &[u8]) -> Result<Tensors, String> {
    let invalid = |error| format!("not a valid file ({error})");
    let counted = Counted::decode(bytes).map_err(invalid)?.graph.unwrap_or_default();
    let n_parts = counted.node.len() + counted.initializer.len();
    if n_parts > MAX_PARTS {
        return Err(format!(
            "it has {n_parts} nodes and tensors, at most {MAX_PARTS} are read; export the backbone alone"
        ));
    }

    let model = Model::decode(bytes).map_err(invalid)?;
    let graph = model.graph.ok_or("it holds no graph")?;

    let mut nameless = HashMap::new();
    let mut tensors = Tensors::new();
    for initializer in graph.initializer {
        let name = initializer.name.clone();
        match backbone_name(&name) {
            Some(known) => drop(tensors.insert(known.to_owned(), tensor(initializer)?)),
            None => drop(nameless.insert(name, initializer)),
        }
    }

    let (mut class, mut patches) = (None, None);

    for node in &graph.node {
        let Some(input) = node.input.iter().find(|input| nameless.contains_key(*input)) else {
            continue;
        };

        let path = node.name.trim_start_matches('/').replace('/', ".");
        let Some(path) = backbone_name(&path) else { continue };
        let weight = path.strip_suffix(".MatMul").filter(|_| node.op_type == "MatMul");
        let slot = match (weight, node.op_type.as_str()) {
            (Some(layer), _) => {
                let weight = transposed(take(&mut nameless, input)?)?;
                tensors.insert(format!("{layer}.weight"), weight);
                continue;
            }
            (None, "Concat") => &mut class,
            (None, "Reshape") => &mut patches,
            _ => continue,
        };
        if path.starts_with("embeddings.") && nameless[input].data_type == FLOAT {
            *slot = Some(take(&mut nameless, input)?);
        }
    }

    let name = "embeddings.position_embeddings".to_owned();
    if let (Some(class), Some(patches)) = (class, patches) {
        tensors.insert(name, joined(class, patches)?);
    }
    Ok(tensors)
}

fn backbone_name(name: &str) -> Option<&str> {
    let name = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name);
    let known = ["embeddings.", "encoder.", "layernorm."];
    known.iter().any(|part| name.starts_with(part)).then_some(name)
}

fn take(nameless: &mut HashMap<String, Initializer>, name: &str) -> Result<Tensor, String> {
    tensor(nameless.remove(name).ok_or_else(|| format!("{name} is used twice"))?)
}

fn tensor(initializer: Initializer) -> Result<Tensor, String> {
    let Initializer { dims, data_type, float_data, name, raw_data } = initializer;
    if data_type != FLOAT {
        return Err(format!("{name} has the data type {data_type}; f32 (1) is needed"));
    }
    let shape: Option<Vec<usize>> = dims.iter().map(|&d| usize::try_from(d).ok()).collect();
    let n_values = shape.as_ref().and_then(|shape| {
        shape.iter().try_fold(1_usize, |product, &extent| product.checked_mul(extent))
    });

    let values = if raw_data.is_empty() {
        float_data
    } else {
        raw_data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };

    match (shape, n_values) {
        (Some(shape), Some(n_values)) if n_values == values.len() && raw_data.len() % 4 == 0 => {
            Ok(Tensor { shape, values })
        }
        _ => Err(format!("{name} of shape {dims:?} holds {} values", values.len())),
    }
}

/// ONNX multiplies from the right: `[in, out]` becomes `[out, in]`.
fn transposed(Tensor { shape, values }: Tensor) -> Result<Tensor, String> {
    let [rows, columns] = shape[..] else {
        return Err(format!("a product with a factor of shape {shape:?}; two axes are needed"));
    };
    let value = |index: usize| values[(index % rows) * columns + index / rows];
    let values = (0..values.len()).map(value).collect();
    Ok(Tensor { shape: vec![columns, rows], values })
}

/// The class position `[1, 1, d]` before the patch positions `[1, n, d]`.
fn joined(class: Tensor, patches: Tensor) -> Result<Tensor, String> {
    let ([1, 1, width], [1, n_patches, other]) = (&class.shape[..], &patches.shape[..]) else {
        return Err(format!("position embeddings of {:?} and {:?}", class.shape, patches.shape));
    };
    if width != other {
        return Err(format!("position embeddings of {width} and {other} channels"));
    }
    let shape = vec![1, 1 + n_patches, *width];
    Ok(Tensor { shape, values: [class.values, patches.values].concat() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn initializer(name: &str, dims: &[i64], values: &[f32]) -> Initializer {
        Initializer {
            dims: dims.to_vec(),
            data_type: FLOAT,
            float_data: Vec::new(),
            name: name.into(),
            raw_data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    fn node(op_type: &str, name: &str, input: &[&str]) -> Node {
        let input = input.iter().map(|name| (*name).to_owned()).collect();
        Node { input, name: name.into(), op_type: op_type.into() }
    }

    fn file(node: Vec<Node>, initializer: Vec<Initializer>) -> Vec<u8> {
        Model { graph: Some(Graph { node, initializer }) }.encode_to_vec()
    }

    #[test]
    fn nameless_factors_are_found_through_their_nodes_and_transposed() {
        let bytes = file(
            vec![
                node("MatMul", "/backbone/encoder/layer.0/mlp/fc1/MatMul", &["x", "onnx::1"]),
                node("Concat", "/backbone/embeddings/Concat_6", &["onnx::2", "y"]),
                node("Reshape", "/backbone/embeddings/Reshape_1", &["onnx::3", "z"]),
                node("MatMul", "/decoder/MatMul", &["x", "onnx::4"]),
            ],
            vec![
                initializer("onnx::1", &[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
                initializer("onnx::2", &[1, 1, 2], &[7.0, 8.0]),
                initializer("onnx::3", &[1, 1, 2], &[9.0, 10.0]),
                initializer("onnx::4", &[1, 1], &[0.0]),
                initializer("backbone.layernorm.bias", &[2], &[5.0, 6.0]),
                initializer("decoder.bias", &[1], &[5.0]),
            ],
        );
        let found = tensors(&bytes).unwrap();
        let names: Vec<&str> = found.keys().map(String::as_str).collect();
        let position = "embeddings.position_embeddings";
        assert_eq!(names, [position, "encoder.layer.0.mlp.fc1.weight", "layernorm.bias"]);
        let fc1 = &found["encoder.layer.0.mlp.fc1.weight"];
        assert_eq!((&fc1.shape[..], &fc1.values[..]), (&[3, 2][..], &[0., 3., 1., 4., 2., 5.][..]));
        assert_eq!(found[position].values, [7.0, 8.0, 9.0, 10.0]);
        assert_eq!(found[position].shape, [1, 2, 2]);
    }

    #[test]
    fn damaged_files_are_errors() {
        let short = file(vec![], vec![initializer("layernorm.bias", &[3], &[1.0])]);
        assert!(tensors(&short).unwrap_err().contains("holds 1 values"));
        let negative = file(vec![], vec![initializer("layernorm.bias", &[-1], &[1.0])]);
        assert!(tensors(&negative).is_err());
        let huge = file(vec![], vec![initializer("layernorm.bias", &[i64::MAX, 4], &[1.0])]);
        assert!(tensors(&huge).is_err());
        assert!(tensors(&[8, 7, 58, 255, 255, 255, 255, 15]).unwrap_err().contains("not a valid"));
        assert!(tensors(&[8, 7]).unwrap_err().contains("no graph"));
    }

    #[test]
    fn nodes_without_content_are_counted_before_they_are_made() {
        let nodes = file(vec![Node::default(); 100_000], vec![]);
        assert!(tensors(&nodes).unwrap().is_empty());
        let more = [nodes, file(vec![], vec![Initializer::default()])].concat();
        let error = tensors(&more).unwrap_err();
        assert!(error.contains("100001 nodes and tensors, at most 100000"), "{error}");
    }
}
