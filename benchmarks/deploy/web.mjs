// Runs an ONNX file in onnxruntime-web (WebAssembly) and writes what it answers.
// node web.mjs job.json: {modules, model, inputs: [{name, type, dims, file}], out}
import { createRequire } from "node:module";
import { readFileSync, writeFileSync } from "node:fs";

const job = JSON.parse(readFileSync(process.argv[2]));
const ort = createRequire(job.modules + "/")("onnxruntime-web");
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";
const session = await ort.InferenceSession.create(job.model, { executionProviders: ["wasm"] });
const feeds = {};
for (const { name, type, dims, file } of job.inputs) {
  const { buffer } = new Uint8Array(readFileSync(file));
  const values = type === "int64" ? new BigInt64Array(buffer) : new Float32Array(buffer);
  feeds[name] = new ort.Tensor(type, values, dims);
}
const result = (await session.run(feeds))[session.outputNames[0]];
writeFileSync(job.out, new Uint8Array(result.data.buffer, result.data.byteOffset, result.data.byteLength));
console.log(JSON.stringify({ dims: result.dims, version: ort.env.versions.web }));
