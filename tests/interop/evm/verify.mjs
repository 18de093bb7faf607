// Reads one JSON object from stdin: { chainId, calls: [{ method, arguments }] }. Compiles NgpuVerifier.sol, deploys it on
// an EVM in this process and answers with { gas, results }: for each call its value as text, or { reverted: reason }.

import { readFileSync } from "node:fs";
import { createEVM } from "@ethereumjs/evm";
import { AbiCoder, Interface, getBytes } from "ethers";
import solc from "solc";

const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const { chainId, calls } = JSON.parse(Buffer.concat(chunks).toString("utf8"));

const source = "NgpuVerifier.sol";
const compiled = JSON.parse(
  solc.compile(
    JSON.stringify({
      language: "Solidity",
      sources: { [source]: { content: readFileSync(new URL(source, import.meta.url), "utf8") } },
      settings: { optimizer: { enabled: true }, viaIR: true, outputSelection: { "*": { "*": ["abi", "evm.bytecode.object"] } } },
    }),
  ),
);
const problems = (compiled.errors ?? []).map((error) => error.formattedMessage);
if (problems.length) throw new Error(problems.join("\n"));
const { abi, evm: output } = compiled.contracts[source].NgpuVerifier;
const contract = new Interface(abi);

const evm = await createEVM();
const gasLimit = 30_000_000n;
const construct = contract.encodeDeploy([chainId]);
const deployed = await evm.runCall({ data: getBytes("0x" + output.bytecode.object + construct.slice(2)), gasLimit });
if (deployed.execResult.exceptionError) throw deployed.execResult.exceptionError;

const results = [];
for (const { method, arguments: given } of calls) {
  const data = getBytes(contract.encodeFunctionData(method, given));
  const { execResult } = await evm.runCall({ to: deployed.createdAddress, data, gasLimit });
  if (execResult.exceptionError) {
    const returned = execResult.returnValue;
    const reason = returned.length > 4 ? AbiCoder.defaultAbiCoder().decode(["string"], returned.slice(4))[0] : execResult.exceptionError.error;
    results.push({ reverted: reason });
  } else {
    const [value] = contract.decodeFunctionResult(method, execResult.returnValue);
    results.push({ value: String(value), gas: Number(execResult.executionGasUsed) });
  }
}
process.stdout.write(JSON.stringify({ results }));
