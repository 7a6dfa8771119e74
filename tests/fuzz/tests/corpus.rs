//! Every input of the corpus keeps its target's promise, and every target has some.

use std::path::Path;

#[test]
fn all_inputs_of_the_corpus_pass() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, run) in fuzz::TARGETS {
        let inputs = std::fs::read_dir(corpus.join(name)).expect("each target has a corpus");
        let mut count = 0;
        for input in inputs {
            let path = input.expect("a file").path();
            println!("{}", path.display());
            run(&std::fs::read(&path).expect("a file"));
            count += 1;
        }
        assert!(count > 0, "{name} has no input");
    }
}
